"""The blob writer: whole files under their name, or none."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from layerpack.formats.blob.header import read_header
from layerpack.formats.blob.layout import BlobLayout, PlainSpec, layout_blob
from layerpack.formats.blob_writer import BlobWriter
from layerpack.formats.digest import Digest, bytes_digest, is_digest

DATA = {"a": bytes(range(120)), "empty": b"", "b": b"xyz"}
SPECS = [
    PlainSpec(name="a", dtype="I32", shape=(5, 6)),
    PlainSpec(name="empty", dtype="F32", shape=(0, 3)),
    PlainSpec(name="b", dtype="U8", shape=(3,)),
]


@pytest.fixture
def layout() -> BlobLayout:
    return layout_blob(SPECS)


def test_what_is_written_is_there_with_its_digest(layout: BlobLayout, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with BlobWriter(path, layout) as writer:
        for name, data in DATA.items():
            writer.write(name, data)
            assert not path.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert is_digest(writer.digest) and writer.digest == bytes_digest(path.read_bytes())
    assert read_header(path) == layout.tensors
    loaded = load_file(path)
    assert {name: array.tobytes() for name, array in loaded.items()} == DATA


@settings(max_examples=50, deadline=None)
@given(cuts=st.sets(st.integers(0, 120), max_size=6))
def test_pieces_make_the_same_bytes(
    cuts: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.safetensors"
    edges = [0, *sorted(cuts), 120]
    with BlobWriter(path, layout_blob(SPECS)) as writer:
        for begin, end in itertools.pairwise(edges):
            writer.write("a", bytearray(DATA["a"][begin:end]))
        writer.write("b", memoryview(DATA["b"]))
    raw = path.read_bytes()
    assert raw[4096:] == DATA["a"] + DATA["b"]
    assert writer.digest == bytes_digest(path.read_bytes())


def test_a_slow_digest_sees_what_was_written(
    layout: BlobLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken in a thread; the caller may use its buffer again at once."""
    update = Digest.update

    def late(self: Digest, data: bytes | bytearray | memoryview) -> None:
        time.sleep(0.02)
        update(self, data)

    monkeypatch.setattr(Digest, "update", late)
    buffer = bytearray(120)
    with BlobWriter(tmp_path / "x", layout) as writer:
        for begin in range(0, 120, 40):
            buffer[:40] = DATA["a"][begin : begin + 40]
            writer.write("a", memoryview(buffer)[:40])
            buffer[:] = bytes(120)
        writer.write("b", DATA["b"])
    assert (tmp_path / "x").read_bytes()[4096:] == DATA["a"] + DATA["b"]
    monkeypatch.setattr(Digest, "update", update)
    assert writer.digest == bytes_digest((tmp_path / "x").read_bytes())
    assert not [t for t in threading.enumerate() if t.name.startswith("layerpack-digest")]


@pytest.mark.parametrize(
    "writes",
    [
        [],
        [("a", DATA["a"])],
        [("a", DATA["a"][:-1]), ("b", b"xyz")],
        [("a", DATA["a"]), ("a", b"x")],
        [("a", DATA["a"] + b"x")],
        [("b", b"xyz"), ("a", DATA["a"])],
        [("c", b"xyz")],
    ],
)
def test_too_little_too_much_or_another_order_leaves_nothing(
    writes: list[tuple[str, bytes]], layout: BlobLayout, tmp_path: Path
) -> None:
    with (
        pytest.raises(ValueError, match="bytes"),
        BlobWriter(tmp_path / "x.safetensors", layout) as writer,
    ):
        for name, data in writes:
            writer.write(name, data)
    assert not list(tmp_path.iterdir())


def test_an_error_inside_leaves_what_stood_there(layout: BlobLayout, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), BlobWriter(path, layout) as writer:
        writer.write("a", DATA["a"])
        raise KeyboardInterrupt
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_passes_through(layout: BlobLayout, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    os.symlink("/dev/full", tmp_path / "x.safetensors.partial")
    with pytest.raises(OSError, match="No space left") as caught, BlobWriter(path, layout):
        pass
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
