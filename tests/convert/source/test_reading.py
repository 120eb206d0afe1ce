"""Files of weights: any range by any thread, a short file is an error, a digest can be ended."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from layerpack.convert.source import reading
from layerpack.convert.source.reading import WeightFile, weights_digest
from layerpack.formats.digest import bytes_digest
from layerpack.formats.errors import SourceError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "weights"
    file.write_bytes(random.Random(1).randbytes(100_000))
    return file


@pytest.mark.parametrize("positional", [True, False], ids=["preadv", "seek"])
def test_threads_read_what_they_ask_for(
    path: Path, monkeypatch: pytest.MonkeyPatch, positional: bool
) -> None:
    if not positional:
        monkeypatch.delattr(os, "preadv")
    elif not hasattr(os, "preadv"):
        pytest.skip("this system has no positional reads")
    monkeypatch.setattr(reading, "_READ_BYTES", 700)
    raw, file = path.read_bytes(), WeightFile(path)

    def read(begin: int) -> bool:
        buffer = bytearray(5000)
        file.read_into(memoryview(buffer), begin, what="a test")
        return buffer == raw[begin : begin + 5000]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(0, 95_000, 250)))
    with pytest.raises(SourceError, match="ends at byte 100000, inside a test"):
        file.read_into(memoryview(bytearray(5001)), 95_000, what="a test")
    file.close()
    file.close()


@pytest.mark.parametrize("piece_bytes", [1000, 33_333, 50_000, 1 << 20])
def test_the_digest_is_that_of_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(reading, "_DIGEST_BYTES", piece_bytes)
    assert weights_digest(path, lambda: None) == bytes_digest(path.read_bytes())
    path.write_bytes(b"")
    assert weights_digest(path, lambda: None) == bytes_digest(path.read_bytes())


def test_a_digest_can_be_ended_and_fails_plainly(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_DIGEST_BYTES", 1000)
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights_digest(path, check)
    assert len(calls) == 5
    calls.clear()

    def shrink() -> None:
        os.truncate(path, 50_000)

    with pytest.raises(SourceError, match="truncated while it was read"):
        weights_digest(path, shrink)
    path.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        weights_digest(path, lambda: None)
