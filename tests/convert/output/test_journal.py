"""Whatever happened to a journal's bytes, only lines that were written are believed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerpack.convert.output.journal import BlobRecord, Journal, Progress, _line, read_journal
from layerpack.formats.blob.nf4 import Nf4State
from layerpack.formats.frames.table import FrameTable

BLOBS = [
    BlobRecord(
        file=f"layer-{index:03d}.safetensors",
        digest="xxh3_128:" + f"{index:x}" * 32,
        states={
            "a.weight": Nf4State(shape=(8, 96), block_size=64, dtype="BF16", nested_offset=0.5),
            "b.weight": Nf4State(shape=(8, 96), block_size=64, dtype="F16", nested_offset=None),
        },
    )
    for index in range(1, 5)
]
BLOBS.append(
    BlobRecord(
        file="layer-005.safetensors.zst",
        digest="xxh3_128:" + "5" * 32,
        states={},
        frames=FrameTable.build(
            first_bytes=4096,
            frame_bytes=8192,
            raw_bytes=4096 + 8192 + 100,
            raw_digest="xxh3_128:" + "a" * 32,
            stored_bytes=[500, 8192, 99],
            coding="zrp",
        ),
    )
)


def written() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal"
        with Journal(path, "run", Progress()) as journal:
            for blob in BLOBS:
                journal.source_digest(blob.file, "sha256:" + "0" * 64)
                journal.blob(blob)
        return path.read_bytes()


RAW = written()


def read(raw: bytes) -> Progress:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal"
        path.write_bytes(raw)
        return read_journal(path)


def test_what_was_written_is_read() -> None:
    progress = read(RAW)
    assert progress.runs == {"run"}
    assert progress.blobs == {blob.file: blob for blob in BLOBS}
    assert len(progress.source_digests) == 5
    assert read_journal(Path("no such file")) == Progress()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(RAW) - 1), st.integers(0, 9), st.binary(max_size=9)),
        min_size=1,
        max_size=4,
    )
)
def test_damage_never_makes_up_a_blob(edits: list[tuple[int, int, bytes]]) -> None:
    raw = RAW
    for position, removed, added in edits:
        raw = raw[:position] + added + raw[position + removed :]
    assert read(raw).blobs.items() <= {blob.file: blob for blob in BLOBS}.items()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_nothing(raw: bytes) -> None:
    assert read(raw) == Progress()


def test_opening_heals_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(RAW[:-20])
    with Journal(path, "run", read_journal(path)) as journal:
        journal.blob(BLOBS[-1])
    assert read_journal(path).blobs == {blob.file: blob for blob in BLOBS}


def test_a_line_that_the_disk_took_in_part_is_an_error(small_disk: Path) -> None:
    path, noted = small_disk / "journal", []
    with Journal(path, "run", Progress()) as journal:
        with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))
        with pytest.raises(OSError):
            for index in range(99):
                journal.source_digest(f"file-{index}", "sha256:" + "0" * 64)
                noted.append(f"file-{index}")
    assert noted
    assert sorted(read_journal(path).source_digests) == sorted(noted)


def test_what_a_run_is_about_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path, "run", Progress(about={"id": "org/name"})) as journal:
        journal.blob(BLOBS[0])
    assert read_journal(path).about == {"id": "org/name"}


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        7,
        [[8, 96], 64, "BF16"],
        [[8, 96], 64, 3, None],
        [[-8], 64, "BF16", None],
        [[8, 96], "64", "BF16", None],
        [[8, 96], 64, "BF16", "0.5"],
        ["8x96", 64, "BF16", None],
    ],
)
def test_a_state_of_another_kind_is_no_blob(state: object, tmp_path: Path) -> None:
    line = {"run": "run", "blob": "a", "digest": BLOBS[0].digest, "states": {"a.weight": state}}
    path = tmp_path / "journal"
    path.write_bytes(_line(line))
    assert read_journal(path) == Progress(runs=frozenset({"run"}))
