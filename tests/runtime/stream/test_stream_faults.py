"""The stream after something broke: in order again, or refusing for good; and who is to blame."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs.faults import threads

from layerpack.formats.errors import StalledError, StreamError
from layerpack.formats.read import BufferedReader, Reader
from layerpack.runtime.core.patience import CancelledError, Patience
from layerpack.runtime.core.slices import Kind, Slice
from layerpack.runtime.stream import ring as ring_module
from layerpack.runtime.stream.lane import HostLane
from layerpack.runtime.stream.ring import ReadRing
from layerpack.runtime.stream.stream import WeightStream

BUFFER_BYTES, LAYERS = 4096, 5
HOST, DISK, MIXED = set(range(LAYERS)), set[int](), {0, 3}
tiers = pytest.mark.parametrize("in_host", [HOST, DISK, MIXED], ids=["host", "disk", "mixed"])


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Slice, ...]:
    """Slices of ten extents, each filled with its own number."""
    folder = tmp_path_factory.mktemp("slices")
    for index in range(LAYERS):
        (folder / f"{index}").write_bytes(bytes([index + 1]) * 10 * BUFFER_BYTES)
    return tuple(
        Slice(
            index=index,
            kind=Kind.LAYER,
            number=index,
            path=folder / f"{index}",
            offset_bytes=0,
            length_bytes=10 * BUFFER_BYTES,
        )
        for index in range(LAYERS)
    )


@contextmanager
def running(
    slices: tuple[Slice, ...],
    lane: HostLane,
    *,
    in_host: set[int] = DISK,
    reader: Reader | None = None,
    watchdog_s: float = 5.0,
    patience: Patience | None = None,
) -> Iterator[WeightStream]:
    used = reader or BufferedReader()

    def make_ring(extent_of: Any) -> ReadRing:
        buffers = [memoryview(bytearray(BUFFER_BYTES)) for _ in range(4)]
        return ReadRing(buffers=buffers, reader=used, extent_of=extent_of, num_threads=2)

    try:
        with WeightStream(
            slices=slices,
            host={
                index: torch.full((slices[index].length_bytes,), index + 1, dtype=torch.uint8)
                for index in in_host
            },
            lane=lane,
            make_ring=make_ring,
            buffer_bytes=BUFFER_BYTES,
            patience=patience or Patience(watchdog_s),
        ) as stream:
            yield stream
    finally:
        used.close()


def make_lane(kind: type[HostLane] = HostLane) -> HostLane:
    return kind(num_slots=2, slot_bytes=10 * BUFFER_BYTES)


def run_pass(stream: WeightStream, lane: HostLane, slices: tuple[Slice, ...]) -> None:
    for part in slices:
        slot = stream.acquire(part.index)
        assert bool((lane.slots[slot] == part.index + 1).all())
        stream.release()


class Breaking(HostLane):
    """Raises once, in the nth call of one method from now on."""

    method, left = "", 0
    error: BaseException = KeyboardInterrupt()

    def arm(self, method: str, calls: int, error: BaseException) -> None:
        self.method, self.left, self.error = method, calls, error

    def _called(self, method: str) -> None:
        if method == self.method:
            self.left -= 1
            if not self.left:
                raise self.error

    def begin_copy(self, slot: int) -> None:
        self._called("begin_copy")

    def end_copy(self, slot: int) -> None:
        self._called("end_copy")

    def wait_ready(self, slot: int) -> None:
        self._called("wait_ready")

    def mark_free(self, slot: int) -> None:
        self._called("mark_free")


@tiers
@pytest.mark.parametrize("method", ["begin_copy", "end_copy", "wait_ready", "mark_free"])
def test_after_a_break_at_any_call_the_next_pass_is_right(
    slices: tuple[Slice, ...], in_host: set[int], method: str
) -> None:
    """With Ctrl-C where the forward pass calls, with a dead thread where the feeder does."""
    for calls in range(1, LAYERS + 1):
        lane = Breaking(num_slots=2, slot_bytes=10 * BUFFER_BYTES)
        with running(slices, lane, in_host=in_host) as stream:
            run_pass(stream, lane, slices)
            by_feeder = method.endswith("copy") and in_host != HOST
            lane.arm(method, calls, ZeroDivisionError() if by_feeder else KeyboardInterrupt())
            begin_s = time.monotonic()
            with pytest.raises((KeyboardInterrupt, StreamError)):
                for _ in range(3):
                    run_pass(stream, lane, slices)
            run_pass(stream, lane, slices)
            assert time.monotonic() - begin_s < 4
        assert threads() == []


@tiers
def test_a_full_device_is_an_error_of_ours(slices: tuple[Slice, ...], in_host: set[int]) -> None:
    lane = Breaking(num_slots=2, slot_bytes=10 * BUFFER_BYTES)
    with running(slices, lane, in_host=in_host) as stream:
        lane.arm("begin_copy", 3, torch.OutOfMemoryError("injected"))
        with pytest.raises(StreamError, match="the device ran out of memory in a copy: injected"):
            for _ in range(3):
                run_pass(stream, lane, slices)
        run_pass(stream, lane, slices)


@tiers
def test_a_break_in_the_very_first_copy_leaves_no_thread(
    slices: tuple[Slice, ...], in_host: set[int]
) -> None:
    lane = Breaking(num_slots=2, slot_bytes=10 * BUFFER_BYTES)
    lane.arm("begin_copy", 1, torch.OutOfMemoryError("injected"))
    with (
        pytest.raises(StreamError, match="ran out of memory"),
        running(slices, lane, in_host=in_host) as stream,
    ):
        run_pass(stream, lane, slices)
    assert threads() == []


class SlowReader(BufferedReader):
    """Each read takes a while."""

    def read(self, path: Path, offset_bytes: int, length_bytes: int, buffer: memoryview) -> None:
        time.sleep(0.2)
        super().read(path, offset_bytes, length_bytes, buffer)


def test_a_slow_disk_is_no_stalled_one(slices: tuple[Slice, ...]) -> None:
    """A slice takes a second here, the watchdog has 0.9: bytes that come are progress."""
    lane = make_lane()
    with running(slices[:1], lane, reader=SlowReader(), watchdog_s=0.45) as stream:
        run_pass(stream, lane, slices[:1])


def test_time_between_passes_is_not_the_streams(slices: tuple[Slice, ...]) -> None:
    lane = make_lane()
    with running(slices, lane, in_host=MIXED, watchdog_s=0.2) as stream:
        for _ in range(2):
            run_pass(stream, lane, slices)
            time.sleep(0.6)


class _Never:
    def __init__(self, over: threading.Event) -> None:
        self._over = over

    def wait(self) -> None:
        self._over.wait(20)


class NoFence(HostLane):
    """A device that does not finish its copies before `over`."""

    over = threading.Event()

    def fence(self) -> Any:
        return _Never(self.over)


def test_a_device_that_hangs_is_not_taken_for_a_disk(slices: tuple[Slice, ...]) -> None:
    lane = make_lane(NoFence)
    with (
        pytest.raises(StalledError, match=r"no bytes of layer 0 .* the device still copies"),
        running(slices, lane, watchdog_s=0.3) as stream,
    ):
        try:
            run_pass(stream, lane, slices)
        finally:
            NoFence.over.set()
    assert threads() == []


class StuckReader(BufferedReader):
    """The first read after `stuck` is set ends only with `over`."""

    def __init__(self) -> None:
        super().__init__()
        self.stuck, self.over = threading.Event(), threading.Event()

    def read(self, path: Path, offset_bytes: int, length_bytes: int, buffer: memoryview) -> None:
        if self.stuck.is_set():
            self.over.wait(20)
        super().read(path, offset_bytes, length_bytes, buffer)


def test_a_reader_that_cannot_be_stopped_ends_the_stream_for_good(
    slices: tuple[Slice, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may still write to its buffer: nobody else must get that."""
    stop = ring_module.ReadRing.stop
    monkeypatch.setattr(ring_module.ReadRing, "stop", lambda ring: stop(ring, timeout_s=0.2))
    lane, reader = make_lane(), StuckReader()
    with (
        pytest.raises(StalledError, match=r"layerpack-read-\d.* did not end"),
        running(slices, lane, reader=reader, watchdog_s=0.3) as stream,
    ):
        run_pass(stream, lane, slices)
        reader.stuck.set()
        with pytest.raises(StalledError, match="the disk does not answer"):
            for _ in range(3):
                run_pass(stream, lane, slices)
        for _ in range(2):
            with pytest.raises(StalledError, match="did not end"):
                run_pass(stream, lane, slices)
        reader.stuck.clear()
        reader.over.set()
    for thread in threading.enumerate():
        if thread.name.startswith("layerpack-"):
            thread.join(5)
    assert threads() == []


def test_a_ring_of_few_tickets_reads_each_once_and_ends(slices: tuple[Slice, ...]) -> None:
    extents = slices[2].extents(BUFFER_BYTES)
    reads: list[int] = []
    reader = BufferedReader()
    ring = ReadRing.over(
        extents,
        buffers=[memoryview(bytearray(BUFFER_BYTES)) for _ in range(3)],
        reader=reader,
        num_threads=4,
        on_read=lambda extent, *_: reads.append(extent.offset_bytes),
    )
    with ring:
        for extent, (taken, view) in zip(extents, ring.take_all(Patience(5)), strict=True):
            assert taken == extent and bytes(view) == b"\x03" * BUFFER_BYTES
            ring.release(None)
    reader.close()
    assert sorted(reads) == [extent.offset_bytes for extent in extents]


def test_who_gives_up_waits_no_longer(slices: tuple[Slice, ...]) -> None:
    """And the next one, who does not, finds the stream in order."""
    lane, reader, patience = make_lane(), StuckReader(), Patience(20)
    with running(slices, lane, reader=reader, patience=patience) as stream:
        run_pass(stream, lane, slices)
        reader.stuck.set()
        threading.Timer(0.3, patience.cancel).start()
        begin_s = time.monotonic()
        with pytest.raises(CancelledError):
            for _ in range(3):
                run_pass(stream, lane, slices)
        assert time.monotonic() - begin_s < 2
        reader.stuck.clear()
        reader.over.set()
        patience.watch(threading.Event())
        run_pass(stream, lane, slices)
