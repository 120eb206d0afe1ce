"""Measuring the disk, and the file that remembers it, whatever is in it."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from layerpack.formats.errors import StreamError
from layerpack.formats.read import BufferedReader
from layerpack.formats.units import MIB
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Kind, Slice
from layerpack.runtime.measure import links as measure
from layerpack.runtime.measure.remembered import Disk, Links, cache_file, load_links, store_links


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def slices(tmp_path: Path) -> tuple[Slice, ...]:
    """Two files of an odd length."""
    found = []
    for index in range(2):
        path = tmp_path / f"{index}"
        path.write_bytes(bytes(4096) + os.urandom(MIB + 100))
        found.append(
            Slice(
                index=index,
                kind=Kind.LAYER,
                number=index,
                path=path,
                offset_bytes=4096,
                length_bytes=MIB + 100,
            )
        )
    return tuple(found)


def test_what_was_stored_is_loaded(home: Path) -> None:
    known = Links(links={"card": 25.5}, disks={"1:2": Disk(gb_s=1.9, num_threads=4)})
    store_links(known)
    assert load_links() == known
    assert [file.name for file in cache_file().parent.iterdir()] == ["machine.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"links": {"card": 25',
        "[]",
        "null",
        '{"links": [], "disks": 3}',
        '{"links": {"card": "fast", "b": true, "c": -1, "d": 0, "e": null, "f": 1e999}}',
        '{"links": {"card": ' + "9" * 400 + "}}",
        '{"links": {"card": NaN}}',
        '{"disks": {"1:2": 1.9}}',
        '{"disks": {"1:2": {"gb_s": 1.9}}}',
        '{"disks": {"1:2": {"gb_s": 1.9, "num_threads": 0}}}',
        '{"disks": {"1:2": {"gb_s": 1.9, "num_threads": 4.0}}}',
        '{"disks": {"1:2": {"gb_s": 1.9, "num_threads": 100000}}}',
        "[" * 100_000,
    ],
    ids=range(14),
)
def test_a_torn_or_wrong_file_is_as_good_as_none(home: Path, text: str) -> None:
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(text)
    assert load_links() == Links()
    cache_file().write_bytes(b"\xff\xfe" + text.encode())
    assert load_links() == Links()


def test_one_wrong_entry_does_not_spoil_the_others(home: Path) -> None:
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text('{"links": {"a": "x", "b": 3}, "disks": {"1:2": 3}}')
    assert load_links() == Links(links={"b": 3.0})


def test_a_cache_that_cannot_be_written_is_no_error(home: Path) -> None:
    home.write_text("a file where the directory should be")
    store_links(Links(links={"card": 1.0}))
    assert load_links() == Links()
    home.unlink()
    cache_file().mkdir(parents=True)  # a directory where the file should be
    store_links(Links(links={"card": 1.0}))
    assert [file.name for file in cache_file().parent.iterdir()] == ["machine.json"]


def test_the_disk_is_measured_once_per_pack_if_enough_was_read(
    home: Path, slices: tuple[Slice, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    first = measure.probe_machine(cpu, slices, patience=Patience())
    assert first.disk_gb_s > 0
    assert not cache_file().exists(), "two megabytes say nothing about a disk"
    monkeypatch.setattr(measure, "_ENOUGH_BYTES", MIB)
    second = measure.probe_machine(cpu, slices, patience=Patience())
    data = json.loads(cache_file().read_text())
    (entry,) = data["disks"].values()
    assert entry == {"gb_s": second.disk_gb_s, "num_threads": second.disk_threads}
    third = measure.probe_machine(cpu, slices, patience=Patience())
    assert (third.disk_gb_s, third.disk_threads) == (second.disk_gb_s, second.disk_threads)
    entry["gb_s"] = 123.0
    cache_file().write_text(json.dumps(data))
    assert measure.probe_machine(cpu, slices, patience=Patience()).disk_gb_s == 123.0
    assert measure.probe_machine(cpu, slices, patience=Patience(), refresh=True).disk_gb_s != 123.0


def test_no_byte_is_read_twice(slices: tuple[Slice, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[tuple[Path, int]] = Counter()
    lock = threading.Lock()

    class Counting(BufferedReader):
        def read(
            self, path: Path, offset_bytes: int, length_bytes: int, buffer: memoryview
        ) -> None:
            with lock:
                reads[path, offset_bytes] += 1  # extents tile a slice
            super().read(path, offset_bytes, length_bytes, buffer)

    monkeypatch.setattr(measure, "open_reader", lambda *_: Counting())
    monkeypatch.setattr(measure, "BUFFER_BYTES", 64 * 1024)
    _, read_bytes = measure.pick_threads(slices, Patience(20))
    assert set(reads.values()) == {1}
    assert 0 < read_bytes <= sum(part.length_bytes for part in slices)


def test_a_read_error_ends_the_measurement(slices: tuple[Slice, ...]) -> None:
    before = threading.active_count()
    files = len(os.listdir("/proc/self/fd"))
    os.truncate(slices[1].path, 5000)
    with pytest.raises(StreamError, match=r"1: ends at byte \d+, wanted .* run `layerpack verify`"):
        measure.pick_threads(slices, Patience(20))
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/fd")) == files
