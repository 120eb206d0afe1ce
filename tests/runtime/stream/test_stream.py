"""The stream under shuffled timing: no slot is read before its copy, nor overwritten while in use.

`MUTANTS` take one wait out each; every one of them must be caught, or these tests prove nothing.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs.fakes import ThreadLane

from layerpack.formats.errors import StalledError, StreamError
from layerpack.formats.read import BufferedReader, Reader
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Extent, Kind, Slice
from layerpack.runtime.stream.ring import ReadRing
from layerpack.runtime.stream.stream import WeightStream

BUFFER_BYTES = 4096
LAYERS = 7


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Slice, ...]:
    """Slices of several lengths, each filled with its own number."""
    folder = tmp_path_factory.mktemp("slices")
    result = []
    for index in range(LAYERS):
        path = folder / f"{index}"
        length = BUFFER_BYTES * (1 + index % 3) + 100 * index
        path.write_bytes(bytes(4096) + bytes([index + 1]) * length)
        result.append(
            Slice(
                index=index,
                kind=Kind.LAYER,
                number=index,
                path=path,
                offset_bytes=4096,
                length_bytes=length,
            )
        )
    return tuple(result)


@contextmanager
def running(
    slices: tuple[Slice, ...],
    lane: ThreadLane,
    *,
    on_disk: set[int],
    reader: Reader | None = None,
    num_buffers: int = 3,
    watchdog_s: float = 20.0,
    ring_class: type[ReadRing] = ReadRing,
) -> Iterator[WeightStream]:
    host = {
        part.index: torch.full((part.length_bytes,), part.index + 1, dtype=torch.uint8)
        for part in slices
        if part.index not in on_disk
    }
    buffers = [memoryview(bytearray(BUFFER_BYTES)) for _ in range(num_buffers)]
    used = reader or BufferedReader()

    def make_ring(extent_of: Any) -> ReadRing:
        return ring_class(buffers=buffers, reader=used, extent_of=extent_of, num_threads=2)

    try:
        with WeightStream(
            slices=slices,
            host=host,
            lane=lane,
            make_ring=make_ring,
            buffer_bytes=BUFFER_BYTES,
            patience=Patience(watchdog_s),
        ) as stream:
            yield stream
    finally:
        used.close()
        lane.close()


def count_wrong(
    stream: WeightStream, lane: ThreadLane, slices: tuple[Slice, ...], passes: int
) -> int:
    """Runs passes whose computation checks every byte of the slot at its beginning and its end."""
    wrong: list[int] = []

    def check(slot: int, part: Slice) -> None:
        for _ in range(2):
            if not bool((lane.slots[slot][: part.length_bytes] == part.index + 1).all()):
                wrong.append(part.index)
            time.sleep(0.0005)

    for _ in range(passes):
        for part in slices:
            slot = stream.acquire(part.index)
            lane.work.order(functools.partial(check, slot, part))
            stream.release()
    lane.drain()
    return len(wrong)


def make_lane(
    kind: type[ThreadLane],
    slices: tuple[Slice, ...],
    *,
    num_slots: int,
    seed: int,
    slow: str = "both",
) -> ThreadLane:
    return kind(
        num_slots=num_slots,
        slot_bytes=max(part.slot_bytes for part in slices),
        seed=seed,
        copy_pause_s=0.002 if slow in ("both", "copy") else 0,
        work_pause_s=0.002 if slow in ("both", "work") else 0,
    )


@pytest.mark.parametrize("on_disk", [set(), {0, 2, 3, 6}, set(range(LAYERS))], ids=str)
@pytest.mark.parametrize("num_slots", [2, 3, 5])
def test_every_slot_is_whole_while_it_is_used(
    slices: tuple[Slice, ...], num_slots: int, on_disk: set[int]
) -> None:
    for seed, slow in enumerate(("both", "copy", "work")):
        lane = make_lane(ThreadLane, slices, num_slots=num_slots, seed=seed, slow=slow)
        with running(slices, lane, on_disk=on_disk) as stream:
            assert count_wrong(stream, lane, slices, passes=4) == 0


class NoWaitForReady(ThreadLane):
    """Mutant: computes before the copy has ended."""

    def wait_ready(self, slot: int) -> None:
        """Does not wait."""


class NoWaitForFree(ThreadLane):
    """Mutant: copies over a slot that is still being read."""

    def begin_copy(self, slot: int) -> None:
        """Does not wait."""


class NoFence(ThreadLane):
    """Mutant: a host buffer is read into again before its copy has run."""

    def fence(self) -> Any:
        event = threading.Event()
        event.set()
        return event


class EagerRing(ReadRing):
    """Mutant: a buffer is given back as it is taken, before its copy is even ordered."""

    def take(self, patience: Patience) -> Any:
        taken = super().take(patience)
        super().release(None)
        return taken

    def release(self, fence: Any) -> None:
        """It was given back already."""


MUTANTS = [(NoWaitForReady, "copy"), (NoWaitForFree, "work"), (NoFence, "copy")]


@pytest.mark.parametrize(("mutant", "slow"), MUTANTS, ids=str)
def test_each_wait_taken_out_is_noticed(
    slices: tuple[Slice, ...], mutant: type[ThreadLane], slow: str
) -> None:
    lane = make_lane(mutant, slices, num_slots=2, seed=1, slow=slow)
    with running(slices, lane, on_disk=set(range(LAYERS))) as stream:
        assert count_wrong(stream, lane, slices, passes=6) > 0


def test_a_ring_that_does_not_wait_for_release_is_noticed(slices: tuple[Slice, ...]) -> None:
    lane = make_lane(ThreadLane, slices, num_slots=2, seed=1, slow="copy")
    on_disk = set(range(LAYERS))
    eager = running(slices, lane, on_disk=on_disk, ring_class=EagerRing, watchdog_s=1.0)
    # It may also lose a extent and stand still: noticed as well.
    with eager as stream, contextlib.suppress(StreamError):
        assert count_wrong(stream, lane, slices, passes=3) > 0


def test_a_pass_in_another_order_starts_the_stream_over(slices: tuple[Slice, ...]) -> None:
    lane = make_lane(ThreadLane, slices, num_slots=2, seed=3)
    rng = random.Random(5)
    with running(slices, lane, on_disk={1, 4, 5}) as stream:
        for _ in range(6):
            start = rng.randrange(LAYERS)
            assert count_wrong(stream, lane, slices[start : start + 2], passes=1) == 0


def test_a_slot_that_was_never_released_does_not_block_the_next_pass(
    slices: tuple[Slice, ...],
) -> None:
    lane = make_lane(ThreadLane, slices, num_slots=2, seed=3)
    with running(slices, lane, on_disk={1, 4, 5}) as stream:
        for part in slices[:-1]:
            stream.acquire(part.index)
            stream.release()
        stream.acquire(slices[-1].index)  # the pass broke off in the last layer
        assert count_wrong(stream, lane, slices, passes=2) == 0


class FailingReader(BufferedReader):
    """Fails, dies or hangs at the nth read."""

    def __init__(self, fail_at: int, how: str) -> None:
        super().__init__()
        self._left = fail_at
        self._how = how
        self._lock = threading.Lock()
        self.go_on = threading.Event()

    def read(self, path: Path, offset_bytes: int, length_bytes: int, buffer: memoryview) -> None:
        with self._lock:
            self._left -= 1
            now = self._left == 0
        if now and self._how == "error":
            raise StreamError(f"{path}: injected read error")
        if now and self._how == "death":
            raise MemoryError("injected")
        if now and self._how == "hang":
            self.go_on.wait(20)
        super().read(path, offset_bytes, length_bytes, buffer)


@pytest.mark.parametrize("fail_at", [1, 2, 5, 17])
@pytest.mark.parametrize(
    ("how", "expected", "words"),
    [
        ("error", StreamError, "injected read error"),
        ("death", StreamError, "reader thread died: MemoryError"),
        ("hang", StalledError, "the disk does not answer"),
    ],
)
def test_a_failing_reader_ends_the_pass_in_bounded_time(
    slices: tuple[Slice, ...], fail_at: int, how: str, expected: type[Exception], words: str
) -> None:
    lane = make_lane(ThreadLane, slices, num_slots=2, seed=3)
    reader = FailingReader(fail_at, how)
    before = threading.active_count() - 2  # the lane's own threads
    begin_s = time.monotonic()
    with (
        pytest.raises(expected, match=words),
        running(slices, lane, on_disk=set(range(LAYERS)), reader=reader, watchdog_s=0.5) as stream,
    ):
        try:
            count_wrong(stream, lane, slices, passes=3)
        finally:
            reader.go_on.set()
    assert time.monotonic() - begin_s < 10
    assert threading.active_count() == before


def test_a_file_truncated_while_running_is_named(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    path.write_bytes(bytes(4096 * 4))
    part = Slice(
        index=0,
        kind=Kind.LAYER,
        number=0,
        path=path,
        offset_bytes=4096,
        length_bytes=4096 * 3,
    )
    lane = make_lane(ThreadLane, (part,), num_slots=2, seed=1)
    with running((part,), lane, on_disk={0}) as stream:
        stream.acquire(0)
        stream.release()
        path.write_bytes(bytes(4096 * 2))
        with pytest.raises(StreamError, match=r"layer: ends at byte 8192, wanted"):
            for _ in range(20):
                stream.acquire(0)
                stream.release()


def test_pieces_tile_a_slice(slices: tuple[Slice, ...]) -> None:
    for part in slices:
        extents = part.extents(BUFFER_BYTES)
        position = part.offset_bytes
        for extent in extents:
            assert isinstance(extent, Extent)
            assert extent.offset_bytes == position
            assert 0 < extent.length_bytes <= BUFFER_BYTES
            position += extent.length_bytes
        assert position == part.offset_bytes + part.length_bytes
