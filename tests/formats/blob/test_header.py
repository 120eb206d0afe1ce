"""The safetensors header: ours against the safetensors library's, and what is not one."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.packs.small import write_small_pack

from layerpack.formats.blob.header import (
    TensorEntry,
    encode_header,
    header_bytes,
    parse_header,
    read_header,
)
from layerpack.formats.errors import PackError, SourceError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = {"dtype": "U8", "shape": [4], "data_offsets": [8, 12]}


def file_of(table: object, data_bytes: int) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def parse(raw: bytes) -> tuple[TensorEntry, ...]:
    return parse_header(raw, file_bytes=len(raw), where="a.safetensors")


def test_entries_come_in_file_order() -> None:
    raw = file_of({"b": NEXT, "a": F32, "__metadata__": {"made": "by hand"}}, 12)
    start = len(raw) - 12
    assert parse(raw) == (
        TensorEntry(name="a", dtype="F32", shape=(2,), offset_bytes=start, length_bytes=8),
        TensorEntry(name="b", dtype="U8", shape=(4,), offset_bytes=start + 8, length_bytes=4),
    )


def with_a(**fields: Any) -> bytes:
    return file_of({"a": {**F32, **fields}}, 8)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"\x02\0\0\0\0\0\0\0{", "9 bytes are too few"),
        (struct.pack("<Q", 1 << 63) + b"{}", "states a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 3) + b"{}", "states a header of 3 bytes in a file of 10"),
        (b"PK\x03\x04" + bytes(99), "not a safetensors file, or truncated"),
        (file_of(b'{"a":', 8), "the safetensors header is not valid JSON"),
        (file_of(b"\xff\xff", 8), "the safetensors header is not valid JSON"),
        (file_of(b'{"a":{},"a":{}}', 0), "duplicate key 'a'"),
        (file_of(b"[" * 50_000, 8), "nested too deeply"),
        (file_of([], 8), "not a JSON object"),
        (file_of({"a": []}, 8), "header entry of tensor a is not valid"),
        (with_a(dtype="F4"), "tensor a has dtype 'F4', which is not known"),
        (with_a(dtype=["F32"]), "which is not known"),
        (with_a(shape=None), "(shape)"),
        (with_a(shape=[2.0]), "(shape)"),
        (with_a(shape=[True, 2]), "(shape)"),
        (with_a(shape=[-2]), "(shape)"),
        (with_a(shape=[1 << 49]), "(shape)"),
        (with_a(shape=[1] * 9), "(shape)"),
        (with_a(shape=[1 << 40] * 8), "tensor a has 8 bytes, its shape needs"),
        (with_a(shape=[3]), "tensor a has 8 bytes, its shape needs 12"),
        (with_a(data_offsets=[0]), "(data_offsets)"),
        (with_a(data_offsets=[0, 8, 16]), "(data_offsets)"),
        (with_a(data_offsets=["0", "8"]), "(data_offsets)"),
        (with_a(data_offsets=[-8, 0]), "(data_offsets)"),
        (with_a(data_offsets=[8, 0]), "tensor a has -8 bytes"),
        (with_a(data_offsets=[1, 9]), "tensor a begins at byte"),
        (file_of({"a": F32, "b": F32}, 8), "tensor b begins at byte"),
        (file_of({"a": F32, "b": {**NEXT, "data_offsets": [9, 13]}}, 13), "tensor b begins"),
        (file_of({"a": F32}, 7), "it is truncated or damaged"),
        (file_of({"a": F32}, 9), "it is truncated or damaged"),
        (file_of({}, 1), "it is truncated or damaged"),
    ],
)
def test_what_is_not_a_header(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    for error in (PackError, SourceError):
        with pytest.raises(error) as caught:
            read_header(path, error=error)
        text = str(caught.value)
        assert text.startswith(f"{path}: ") and message in text and "\n" not in text


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(PackError, match="cannot be read"):
            read_header(path)


@pytest.mark.parametrize("stated", [99_999_999, 100_000_000, 1 << 40, (1 << 64) - 1])
def test_a_lying_header_reserves_no_memory(stated: int, tmp_path: Path) -> None:
    path = tmp_path / "liar.safetensors"
    path.write_bytes(struct.pack("<Q", stated) + b"{}" + bytes(1000))
    tracemalloc.start()
    try:
        with pytest.raises(PackError, match=f"states a header of {stated} bytes"):
            read_header(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100_000


def test_a_header_is_bounded_in_a_large_file_too(tmp_path: Path) -> None:
    path = tmp_path / "holes.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(1 << 33)
    with pytest.raises(PackError, match="states a header of 100000001 bytes"):
        read_header(path)


DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "U8": "u1", "I64": "<i8", "BOOL": "?"}
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
TABLES = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(table=TABLES)
def test_the_library_reads_ours_and_we_the_librarys(
    table: dict[str, tuple[str, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "both.safetensors"
    arrays = {
        name: np.arange(np.prod(shape, dtype=int)).astype(DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape) in table.items()
    }
    entries, position = [], 0
    for name, array in arrays.items():
        entry = TensorEntry(
            name=name,
            dtype=table[name][0],
            shape=array.shape,
            offset_bytes=position,
            length_bytes=array.nbytes,
        )
        entries.append(entry)
        position += array.nbytes
    start = header_bytes(entries)
    placed = [
        TensorEntry(
            name=entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            offset_bytes=entry.offset_bytes + start,
            length_bytes=entry.length_bytes,
        )
        for entry in entries
    ]
    header = encode_header(placed, data_start_bytes=start)
    assert len(header) == start and start % 4096 == 0
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays.values()))
    assert set(read_header(path)) == set(placed)
    loaded = load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype and np.array_equal(loaded[name], array)
    save_file(arrays, path)
    theirs = {entry.name: (entry.dtype, list(entry.shape)) for entry in read_header(path)}
    assert theirs == {name: (dtype, list(shape)) for name, (dtype, shape) in table.items()}


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 2500), st.integers(0, 9), st.binary(max_size=9)),
        min_size=1,
        max_size=3,
    ),
    kept=st.booleans(),
)
def test_mutated_bytes_are_read_or_refused(
    edits: list[tuple[int, int, bytes]], kept: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pack = tmp_path_factory.getbasetemp() / "mutants"
    if not pack.exists():
        write_small_pack(pack)
    raw = (pack / "layer-000.safetensors").read_bytes()
    for position, removed, added in edits:
        end = position + (len(added) if kept else removed)
        raw = raw[:position] + added + raw[end:]
    try:
        entries = parse(raw)
    except PackError as error:
        assert "\n" not in str(error)
        return
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    assert sum(entry.length_bytes for entry in entries) == len(raw) - start


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_read_or_refused(raw: bytes) -> None:
    with contextlib.suppress(PackError):
        parse(raw)


def test_a_header_that_does_not_fit_is_a_mistake_of_ours() -> None:
    entry = TensorEntry(name="a" * 5000, dtype="U8", shape=(), offset_bytes=4096, length_bytes=1)
    with pytest.raises(ValueError, match="does not fit"):
        encode_header([entry], data_start_bytes=4096)
    assert header_bytes([entry]) == 8192
