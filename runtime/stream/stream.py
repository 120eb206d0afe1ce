"""The weight stream: slices arrive in device slots in the order of a pass, pass after pass.

    file -> reader threads -> ReadRing -> feeder thread -> lane (device slots) -> forward
    host memory ------------------------^

One owner orders the copies, ahead of the forward pass by as many slices as there are free slots and
across the end of a pass into the next one: the order never changes. Where bytes must be waited for
that owner is a feeder thread; where all of them are in host memory ordering a copy is a few
microseconds, and the forward pass does it itself as it releases a slot. A thread would only fight
it for the interpreter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import TracebackType

import torch

from layerpack.formats.errors import StalledError, StreamError
from layerpack.runtime.core.device_errors import (
    device_failed,
    failed_device_ignored,
    is_device_error,
)
from layerpack.runtime.core.patience import TICK_S, Patience
from layerpack.runtime.core.slices import Extent, Slice
from layerpack.runtime.stream.lane import Lane
from layerpack.runtime.stream.ring import ReadRing
from layerpack.runtime.trace.layer_spans import LayerSpans
from layerpack.runtime.trace.trace import GPU_COPY_ROW, NO_TRACE, Trace

_JOIN_S = 30.0
RingFactory = Callable[[Callable[[int], Extent]], ReadRing]


class WeightStream:
    """Slot: FREE -feeder copies-> READY -acquire-> forward -release-> FREE

    `host` maps a slice's index to its bytes in pinned or registered memory; every other slice is
    read from disk through the ring that `make_ring` opens (None if there is no such slice).
    Use as a context manager: leaving it joins every thread and waits for every copy.
    """

    def __init__(
        self,
        *,
        slices: Sequence[Slice],
        host: Mapping[int, torch.Tensor],
        lane: Lane,
        make_ring: RingFactory | None,
        buffer_bytes: int,
        patience: Patience,
        trace: Trace = NO_TRACE,
    ) -> None:
        self._slices = tuple(slices)
        self._place = {part.index: place for place, part in enumerate(self._slices)}
        self._host = host
        self._lane = lane
        self._make_ring = make_ring
        self._extents = {
            place: part.extents(buffer_bytes)
            for place, part in enumerate(self._slices)
            if part.index not in host
        }
        self._patience = patience
        # The feeder reads ahead for whatever comes next: nobody who gives up ends it.
        self._feeding = Patience(patience.watchdog_s)
        self._trace, self._spans = trace, LayerSpans(trace)
        self._num_slots = len(lane.slots)
        self._thread: threading.Thread | None = None
        self._ring: ReadRing | None = None
        # Between a pass that broke off and the next one the stream is not in order: an error may
        # have come anywhere. What is stuck in the kernel can not be started over.
        self._in_order = self._closed = False
        self._stuck: StalledError | None = None
        self._reset(0)

    def _reset(self, place: int) -> None:
        # Counts of slices since the start at `place`, each written by one thread.
        self._start = place
        self._issued = self._released = self._acquired = 0
        # Tokens between forward pass and feeder: one for each free slot, one for each slice that
        # was issued, and one to end a wait.
        self._free: SimpleQueue[None] = SimpleQueue()
        self._ready: SimpleQueue[None] = SimpleQueue()
        self._moved_s = time.monotonic()
        self._error: BaseException | None = None
        self._stopping = False

    def __enter__(self) -> WeightStream:
        try:
            self._start_over(0)
        except BaseException:
            self._halt()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed, self._in_order = True, False
        self._halt()

    def acquire(self, index: int) -> int:
        """The slot that holds slice `index`; waits until its copy is ordered on the device.

        Computation that is ordered after this call sees the whole slice. After a pass that broke
        off in the middle the stream starts over at `index`. Raises StreamError, StalledError.
        """
        if self._closed:
            raise StreamError("the model is closed; open it again")
        self._patience.check()
        place = self._place[index]
        title = self._slices[place].title
        expected = (self._start + self._acquired) % len(self._slices)
        if not self._in_order or place != expected or self._acquired != self._released:
            self._start_over(place)
        self._in_order = False
        begin_s = time.perf_counter()
        self._spans.await_bytes()
        if self._thread is not None:
            self._await_issue(title)
        slot = self._acquired % self._num_slots
        self._lane.wait_ready(slot)
        self._spans.arrived(title)
        self._acquired += 1
        self._in_order = True
        self._trace.wait(title, begin_s, time.perf_counter())
        return slot

    def begin(self) -> None:
        """The work on the slice acquired last is ordered from here on, for the trace."""
        self._spans.begin(resident=False)

    def _await_issue(self, title: str) -> None:
        # The ring's own watchdog is the first to bark when the disk stands still.
        patience_s = 2 * self._patience.watchdog_s
        begin_s = time.monotonic()
        while True:
            try:
                self._ready.get(timeout=min(TICK_S, patience_s))
                break
            except Empty:
                self._patience.check()
                if time.monotonic() > max(begin_s, self._moved_s) + patience_s:
                    raise StalledError(
                        f"{title}: no byte was copied to the device within "
                        f"{patience_s:.0f} s; the copy stage stands still"
                    ) from None
        if self._issued <= self._acquired:
            self._raise()

    def release(self) -> None:
        """Give back the slot acquired last, once the computation ordered so far has run.

        Raises StreamError if the next copy, which this call may order, fails.
        """
        self._in_order = False
        place = (self._start + self._acquired - 1) % len(self._slices)
        self._spans.end(self._slices[place].title)
        self._lane.mark_free((self._acquired - 1) % self._num_slots)
        self._released = self._acquired
        if self._thread is None:  # all bytes are at hand
            with self._errors_named():
                self._copy()
        else:
            self._free.put(None)
        self._in_order = True

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._error = error
            self._raise()

    def _raise(self) -> None:
        error = self._error
        if isinstance(error, StreamError):
            raise type(error)(str(error)) from error
        if isinstance(error, torch.OutOfMemoryError):
            raise StreamError(f"the device ran out of memory in a copy: {error}") from error
        if error is not None and is_device_error(error):
            raise device_failed("in a copy", error) from error
        raise StreamError(f"copying to the device failed: {error!r}") from error

    def _start_over(self, place: int) -> None:
        self._halt()
        self._reset(place)
        if not self._extents:
            for _ in range(self._num_slots):
                with self._errors_named():
                    self._copy()
        else:
            assert self._make_ring is not None, "slices on disk need a ring"
            self._ring = self._make_ring(self._extent_order())
            self._ring.start()
            for _ in range(self._num_slots):
                self._free.put(None)
            self._thread = threading.Thread(target=self._feed, name="layerpack-feed", daemon=True)
            self._thread.start()
        self._in_order = True

    def _extent_order(self) -> Callable[[int], Extent]:
        """Ticket -> extent, for the cycle that begins at the current start."""
        count = len(self._slices)
        cycle = [
            extent
            for step in range(count)
            for extent in self._extents.get((self._start + step) % count, ())
        ]
        return lambda ticket: cycle[ticket % len(cycle)]

    def _halt(self) -> None:
        """Join the threads and wait for the copies that are under way.

        Raises StalledError if a thread is stuck; then for good, as it may still write to a buffer.
        """
        if self._stuck is not None:
            raise StalledError(str(self._stuck)) from self._stuck
        self._stopping = True
        self._free.put(None)
        ring, self._ring = self._ring, None
        thread, self._thread = self._thread, None
        try:
            if ring is not None:
                ring.stop()
            if thread is not None:
                thread.join(_JOIN_S)
                if thread.is_alive():
                    raise StalledError(f"the copy thread did not end within {_JOIN_S:.0f} s")
        except StalledError as error:
            self._stuck = error
            raise
        finally:
            with failed_device_ignored():
                self._lane.drain()

    def _feed(self) -> None:
        try:
            while True:
                self._free.get()
                if self._stopping:
                    return
                self._copy()
                self._ready.put(None)
        except BaseException as error:  # any end of the feeder must wake the forward pass
            self._error = error
            self._ready.put(None)

    def _copy(self) -> None:
        """Order the next copy."""
        place = (self._start + self._issued) % len(self._slices)
        part, slot = self._slices[place], self._issued % self._num_slots
        lane, clock = self._lane, self._trace.clock
        begin_s = time.perf_counter()
        lane.begin_copy(slot)
        if (source := self._host.get(part.index)) is not None:
            begun = clock.begin(GPU_COPY_ROW)
            lane.copy(slot, 0, source)
            clock.end(GPU_COPY_ROW, part.title, begun, source.numel())
        else:
            self._copy_extents(part, place, slot)
        lane.end_copy(slot)
        self._trace.copy(part.title, begin_s, time.perf_counter(), part.length_bytes)
        self._issued += 1

    def _copy_extents(self, part: Slice, place: int, slot: int) -> None:
        ring, clock = self._ring, self._trace.clock
        assert ring is not None
        for _ in self._extents[place]:
            extent, view = ring.take(self._feeding)
            source = torch.frombuffer(view, dtype=torch.uint8)
            begun = clock.begin(GPU_COPY_ROW)
            self._lane.copy(slot, extent.offset_bytes - part.offset_bytes, source)
            clock.end(GPU_COPY_ROW, part.title, begun, extent.length_bytes)
            ring.release(self._lane.fence())
            self._moved_s = time.monotonic()
