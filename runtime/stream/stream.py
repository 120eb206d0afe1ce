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
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType

import torch

from layerpack.formats.errors import StalledError, StreamError
from layerpack.runtime.core.device_errors import (
    device_failed,
    failed_device_ignored,
    is_device_error,
)
from layerpack.runtime.core.interrupts import deferred_interrupts
from layerpack.runtime.core.pieces import Piece, split
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.stream.lane import Lane
from layerpack.runtime.stream.ring import ReadRing
from layerpack.runtime.trace.trace import GPU_COPY_ROW, NO_TRACE, Trace

_JOIN_S = 30.0
RingFactory = Callable[[Callable[[int], Piece]], ReadRing]


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
        piece_bytes: int,
        watchdog_s: float = 60.0,
        trace: Trace = NO_TRACE,
    ) -> None:
        self._slices = tuple(slices)
        self._place = {part.index: place for place, part in enumerate(self._slices)}
        self._host = host
        self._lane = lane
        self._make_ring = make_ring
        self._pieces = {
            place: split(part, piece_bytes)
            for place, part in enumerate(self._slices)
            if part.index not in host
        }
        self._watchdog_s = watchdog_s
        self._trace = trace
        self._num_slots = len(lane.slots)
        self._thread: threading.Thread | None = None
        self._ring: ReadRing | None = None
        # Between passes that broke off and the next one the stream is not in order: an error or
        # Ctrl-C may have come anywhere. What is stuck in the kernel can not be started over.
        self._in_order = self._closed = False
        self._stuck: StalledError | None = None
        self._reset(0)

    def _reset(self, place: int) -> None:
        # Counts of slices since the start at `place`, each written by one thread.
        self._start = place
        self._issued = self._released = self._acquired = 0
        # Tokens between forward pass and feeder: one for each free slot, one for each slice that
        # was issued, and one to end a wait. Not a Condition: Ctrl-C can come between taking its
        # lock and entering the block, and the lock is then never given back.
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
        trace: TracebackType | None,
    ) -> None:
        self._closed, self._in_order = True, False
        self._halt()

    def acquire(self, index: int) -> int:
        """The slot that holds slice `index`; waits until its copy is ordered on the device.

        Computation that is ordered after this call sees the whole slice. After a pass that broke
        off in the middle the stream starts over at `index`. Raises StreamError, StalledError.
        """
        place = self._place[index]
        expected = (self._start + self._acquired) % len(self._slices)
        if not self._in_order or place != expected or self._acquired != self._released:
            self._start_over(place)
        self._in_order = False
        begin_s = time.perf_counter()
        if self._thread is not None:
            self._await_issue(place)
        slot = self._acquired % self._num_slots
        self._lane.wait_ready(slot)
        self._acquired += 1
        self._in_order = True
        self._trace.wait(self._slices[place].title, begin_s, time.perf_counter())
        return slot

    def _await_issue(self, place: int) -> None:
        # The ring's own watchdog is the first to bark when the disk stands still.
        patience_s = 2 * self._watchdog_s
        begin_s = time.monotonic()
        while True:
            left_s = max(begin_s, self._moved_s) + patience_s - time.monotonic()
            try:
                self._ready.get(timeout=max(0.0, left_s))
                break
            except Empty:
                if left_s <= 0:
                    raise StalledError(
                        f"{self._slices[place].title}: no byte was copied to the device within "
                        f"{patience_s:.0f} s; the copy stage stands still"
                    ) from None
        if self._issued <= self._acquired:
            self._raise()

    def release(self) -> None:
        """Give back the slot acquired last, once the computation ordered so far has run.

        Raises StreamError if the next copy, which this call may order, fails.
        """
        self._in_order = False
        self._lane.mark_free((self._acquired - 1) % self._num_slots)
        self._released = self._acquired
        if self._thread is None:
            self._order(self._issued)
        else:
            self._free.put(None)
        self._in_order = True

    def _order(self, sequence: int) -> None:
        """Copy in this thread: all bytes are at hand."""
        try:
            self._copy(sequence)
        except Exception as error:
            self._error = error
            self._raise()
        self._issued = sequence + 1

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
        if self._closed:
            raise StreamError("the model is closed; open it again")
        with deferred_interrupts():
            self._halt()
            self._reset(place)
            self._launch()
            self._in_order = True

    def _launch(self) -> None:
        if not self._pieces:
            for sequence in range(self._num_slots):
                self._order(sequence)
            return
        assert self._make_ring is not None, "slices on disk need a ring"
        self._ring = self._make_ring(self._piece_order())
        self._ring.start()
        for _ in range(self._num_slots):
            self._free.put(None)
        self._thread = threading.Thread(target=self._feed, name="layerpack-feed", daemon=True)
        self._thread.start()

    def _piece_order(self) -> Callable[[int], Piece]:
        """Ticket -> piece, for the cycle that begins at the current start."""
        count = len(self._slices)
        cycle = [
            piece
            for step in range(count)
            for piece in self._pieces.get((self._start + step) % count, ())
        ]
        return lambda ticket: cycle[ticket % len(cycle)]

    def _halt(self) -> None:
        """Join the threads and wait for the copies that are under way.

        Raises StalledError if a thread is stuck; then for good, as it may still write to a buffer.
        """
        with deferred_interrupts():
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
            sequence = 0
            while self._await_slot():
                self._copy(sequence)
                sequence += 1
                self._issued = sequence
                self._ready.put(None)
        except BaseException as error:  # any end of the feeder must wake the forward pass
            self._error = error
            self._ready.put(None)

    def _await_slot(self) -> bool:
        self._free.get()
        return not self._stopping

    def _copy(self, sequence: int) -> None:
        place = (self._start + sequence) % len(self._slices)
        part, slot = self._slices[place], sequence % self._num_slots
        self._lane.begin_copy(slot)
        begin_s = time.perf_counter()
        if (source := self._host.get(part.index)) is not None:
            self._send(slot, 0, source, part.title)
        else:
            assert self._ring is not None
            ring = self._ring
            for _ in self._pieces[place]:
                piece, view = ring.take(timeout_s=self._watchdog_s)
                offset = piece.offset_bytes - part.offset_bytes
                self._send(slot, offset, torch.frombuffer(view, dtype=torch.uint8), part.title)
                ring.release(self._lane.fence())
                self._moved_s = time.monotonic()
        self._lane.end_copy(slot)
        self._trace.copy(part.title, begin_s, time.perf_counter(), part.length_bytes)

    def _send(self, slot: int, offset_bytes: int, source: torch.Tensor, title: str) -> None:
        clock = self._trace.clock
        begun = clock.begin(GPU_COPY_ROW)
        self._lane.copy(slot, offset_bytes, source)
        clock.end(GPU_COPY_ROW, title, begun, source.numel())
