"""Frames: what goes in comes out, and what is damaged is an error of ours, within bounds."""

from __future__ import annotations

import contextlib
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from layerpack.formats.blob.layout import BlobLayout, PlainSpec, layout_blob
from layerpack.formats.blob_writer import BlobWriter
from layerpack.formats.digest import bytes_digest
from layerpack.formats.errors import PackError, StreamError
from layerpack.formats.frames.coding import FrameDecoder, encode_frame
from layerpack.formats.frames.reader import FrameReader
from layerpack.formats.frames.table import Coding, FrameTable
from layerpack.formats.read import BufferedReader, open_reader
from layerpack.formats.units import MIB

DIGEST = "xxh3_128:" + 32 * "0"
SOME_BYTES = st.binary(max_size=300) | st.integers(1, 9000).map(lambda n: bytes(range(7)) * n)
GOOD = {
    "first_bytes": 4096,
    "frame_bytes": 8192,
    "raw_bytes": 4096 + 8192 + 100,
    "raw_digest": DIGEST,
    "stored_bytes": [4096, 5000, 60],
    "coding": "rzp",
}


def decoded(stored: bytes, coding: Coding, raw_bytes: int) -> bytes:
    target = bytearray(raw_bytes)
    FrameDecoder().decode(memoryview(stored), coding, memoryview(target))
    return bytes(target)


@given(raw=SOME_BYTES.filter(bool), planes=st.booleans(), level=st.sampled_from([1, 3]))
def test_what_goes_in_comes_out(raw: bytes, planes: bool, level: int) -> None:
    coding, stored = encode_frame(raw, level=level, planes=planes)
    assert len(stored) <= len(raw)
    assert decoded(bytes(stored), coding, len(raw)) == raw


def test_sixteen_bit_floats_gain_by_planes() -> None:
    chance = random.Random(0)
    exponents = [0x3B, 0x3C, 0xBB, 0xBC]
    raw = b"".join(bytes((chance.randrange(256), chance.choice(exponents))) for _ in range(1 << 18))
    (by_planes, small), (whole, large) = (
        encode_frame(raw, level=1, planes=planes) for planes in (True, False)
    )
    assert (by_planes, whole) == (Coding.PLANES, Coding.ZSTD)
    assert len(small) < 0.66 * len(raw) < len(large)


@given(data=st.data(), coding=st.sampled_from([Coding.ZSTD, Coding.PLANES]))
@settings(max_examples=300)
def test_damaged_frames_are_pack_errors(data: st.DataObject, coding: Coding) -> None:
    raw = data.draw(st.integers(3000, 9000).map(lambda n: bytes(range(9)) * n))
    _, stored = encode_frame(raw, level=1, planes=coding is Coding.PLANES)
    changed = bytearray(stored)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.integers(0, len(changed)))]
    with contextlib.suppress(PackError):
        assert len(decoded(bytes(changed), coding, len(raw))) == len(raw)


@given(stored=st.binary(max_size=200), raw_bytes=st.integers(1, 5000))
def test_any_bytes_for_a_frame(stored: bytes, raw_bytes: int) -> None:
    for coding in Coding:
        with contextlib.suppress(PackError):
            assert len(decoded(stored, coding, raw_bytes)) == raw_bytes


@pytest.mark.parametrize("wrong", [-1, 1, 5000])
def test_a_length_that_lies(wrong: int) -> None:
    raw = bytes(range(10)) * 1000
    _, stored = encode_frame(raw, level=1, planes=False)
    for coding in Coding:
        with pytest.raises(PackError):
            decoded(bytes(stored), coding, len(raw) + wrong)


def test_lies_about_the_length_or_the_window_take_no_memory() -> None:
    huge = zstandard.ZstdCompressor(level=1).compress(bytes(256 * MIB))
    wide = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=True)
    torn = zstandard.ZstdCompressor(compression_params=wide).compress(bytes(256 * MIB))[:-3]
    none = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(4096))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for stored in (huge, torn, none, huge + b"more"):
        with pytest.raises(PackError):
            decoded(stored, Coding.ZSTD, 4096)
    grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown_bytes < 8 * MIB


def test_bytes_after_a_frame_do_not_pass() -> None:
    raw = bytes(5000)
    _, stored = encode_frame(raw, level=1, planes=False)
    with pytest.raises(PackError):
        decoded(bytes(stored) * 2, Coding.ZSTD, 10000)


def test_a_table_that_adds_up() -> None:
    table = FrameTable.build(**GOOD)  # type: ignore[arg-type]
    assert [frame.offset_bytes for frame in table.frames] == [0, 4096, 12288]
    assert [frame.raw_offset_bytes for frame in table.frames] == [0, 4096, 12288]
    assert [frame.raw_bytes for frame in table.frames] == [4096, 8192, 100]
    assert table.file_bytes == 16384
    for begin in range(0, table.raw_bytes, 97):
        for end in range(begin + 1, table.raw_bytes + 1, 1013):
            wanted = [
                frame
                for frame in table.frames
                if frame.raw_offset_bytes < end and frame.raw_offset_bytes + frame.raw_bytes > begin
            ]
            assert list(table.covering(begin, end - begin)) == wanted


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"frame_bytes": 0}, "not supported"),
        ({"frame_bytes": 4097}, "not supported"),
        ({"frame_bytes": 1 << 40}, "not supported"),
        ({"first_bytes": 0}, "header"),
        ({"first_bytes": 1 << 40}, "header"),
        ({"first_bytes": 65 * MIB, "raw_bytes": 66 * MIB}, "header of"),
        ({"raw_bytes": 1 << 47}, "3 lengths"),
        ({"raw_bytes": 4096}, "header"),
        ({"stored_bytes": [4096, 5000]}, "2 lengths"),
        ({"coding": "rzpp"}, "4 codings"),
        ({"coding": "rzx"}, "unknown coding"),
        ({"stored_bytes": [4095, 5000, 60]}, "frame 0"),
        ({"stored_bytes": [4096, 8192, 60]}, "frame 1"),
        ({"stored_bytes": [4096, 5000, 0]}, "frame 2"),
    ],
)
def test_tables_that_do_not_add_up(fields: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        FrameTable.build(**GOOD | fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def layout() -> BlobLayout:
    return layout_blob(
        [
            PlainSpec(name="floats", dtype="F32", shape=(3000,)),
            PlainSpec(name="halves", dtype="BF16", shape=(100, 333)),
            PlainSpec(name="bytes", dtype="U8", shape=(5001,)),
        ]
    )


WriteBlob = Callable[..., tuple[Path, BlobWriter]]


@pytest.fixture(scope="module")
def write_blob(layout: BlobLayout, tmp_path_factory: pytest.TempPathFactory) -> WriteBlob:
    """`write_blob(name, piece_bytes, zstd_level=…)`: the same tensors, given in such pieces."""

    def write(
        name: str, piece_bytes: int, zstd_level: int | None = None
    ) -> tuple[Path, BlobWriter]:
        path = tmp_path_factory.mktemp("blobs") / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("layerpack.formats.blob_writer.FRAME_BYTES", 8192)
            writer = BlobWriter(path, layout, zstd_level=zstd_level)
        with writer:
            for entry in layout.tensors:
                raw = memoryview(bytes(range(50)) * entry.length_bytes)[: entry.length_bytes]
                for begin in range(0, entry.length_bytes, piece_bytes):
                    writer.write(entry.name, raw[begin : begin + piece_bytes])
        return path, writer

    return write


def test_the_pieces_it_is_given_in_do_not_matter(write_blob: WriteBlob) -> None:
    path, writer = write_blob("a.safetensors.zst", 1 << 20, zstd_level=1)
    other, again = write_blob("a.safetensors.zst", 777, zstd_level=1)
    assert path.read_bytes() == other.read_bytes()
    assert writer.frames == again.frames and writer.frames is not None
    assert writer.digest == again.digest == bytes_digest(path.read_bytes())
    assert path.stat().st_size == writer.frames.file_bytes
    assert {frame.coding for frame in writer.frames.frames} >= {Coding.ZSTD, Coding.PLANES}


def test_any_range_is_that_of_the_plain_file(write_blob: WriteBlob, layout: BlobLayout) -> None:
    plain, plain_writer = write_blob("a.safetensors", 4096)
    path, writer = write_blob("a.safetensors.zst", 4096, zstd_level=1)
    assert writer.frames is not None and writer.frames.raw_digest == plain_writer.digest
    raw, chance = plain.read_bytes(), random.Random(1)
    for inner in (BufferedReader(), open_reader(path)):
        reader = FrameReader(inner, {path: writer.frames})
        ranges = [(0, len(raw)), (0, 0), (0, 1), (len(raw) - 1, 1), (layout.data_start_bytes, 8192)]
        for _ in range(100):
            begin = chance.randrange(len(raw))
            ranges.append((begin, chance.randrange(len(raw) - begin) + 1))
        for begin, length in ranges:
            buffer = bytearray(b"\xaa" * (length + 10))
            reader.read(path, begin, length, memoryview(buffer))
            assert buffer == raw[begin : begin + length] + b"\xaa" * 10
        with pytest.raises(StreamError, match=f"holds {len(raw)} bytes"):
            reader.read(path, 1, len(raw), memoryview(bytearray(len(raw))))
        reader.close()
