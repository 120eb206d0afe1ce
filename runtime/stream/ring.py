"""A ring of host buffers between the threads that read the disk and the one that feeds the device.

The extents of a pass have tickets 0, 1, 2 …; ticket t uses buffer t % num_slots. Readers finish in
any order, the consumer takes in ticket order. Nothing here knows torch: a buffer is a memoryview,
a fence anything with `wait()`, so all of it is tested without a GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from types import TracebackType
from typing import Protocol

from layerpack.formats.errors import StalledError, StreamError
from layerpack.formats.read import Reader
from layerpack.runtime.core.patience import TICK_S, Patience
from layerpack.runtime.core.slices import Extent


class Fence(Protocol):
    """Something in the past that a buffer's next owner must wait for."""

    def wait(self) -> None:
        """Block until it has happened."""


class _Stage(Enum):
    """What a ticket's reader is at: the reason to give when it stands still."""

    WAITING = "no reader is free for them; all of them wait"
    FENCE = "the device still copies from their buffer; it does not answer"
    READING = "the disk does not answer"


class ReadRing:
    """FREE -claim-> reader -publish-> READY -take-> consumer -release(fence)-> FREE

    `extent_of(ticket)` names what to read for a ticket; it is pure and may be called from any
    reader thread. Tickets go on without end, or up to `num_tickets`. The first error of a reader
    is kept whole and raised by `take`. As a context manager it starts, and stops at the end.
    """

    def __init__(
        self,
        *,
        buffers: Sequence[memoryview],
        reader: Reader,
        extent_of: Callable[[int], Extent],
        num_threads: int,
        num_tickets: int | None = None,
        on_read: Callable[[Extent, float, float], None] | None = None,
    ) -> None:
        self._buffers = buffers
        self._reader = reader
        self._extent_of = extent_of
        self._num_tickets = num_tickets
        self._on_read = on_read
        self._changed = threading.Condition()
        # Guarded by _changed: for each slot, the ticket that is READY in it, the fence that its
        # next reader must wait for, and what its reader is at; the next ticket to claim and the
        # next to be taken.
        self._ready: list[int | None] = [None] * len(buffers)
        self._fences: list[Fence | None] = [None] * len(buffers)
        self._stages = [_Stage.WAITING] * len(buffers)
        self._next_claim = 0
        self._next_take = 0
        self._released = 0
        self._error: BaseException | None = None
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._read_loop, name=f"layerpack-read-{i}", daemon=True)
            for i in range(num_threads)
        ]

    @classmethod
    def over(
        cls,
        extents: Sequence[Extent],
        *,
        buffers: Sequence[memoryview],
        reader: Reader,
        num_threads: int,
        on_read: Callable[[Extent, float, float], None] | None = None,
    ) -> ReadRing:
        """A ring that reads each of `extents` once, in this order."""
        return cls(
            buffers=buffers,
            reader=reader,
            extent_of=extents.__getitem__,
            num_threads=num_threads,
            num_tickets=len(extents),
            on_read=on_read,
        )

    def __enter__(self) -> ReadRing:
        try:
            self.start()
        except BaseException:  # no more threads, say
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to read ahead, as far as there are buffers."""
        for thread in self._threads:
            thread.start()

    def take(self, patience: Patience) -> tuple[Extent, memoryview]:
        """The next ticket's extent and its bytes; waits. The buffer is yours until `release`.

        Raises StreamError with the cause if a reader failed, StalledError, CancelledError.
        """
        deadline_s = time.monotonic() + patience.watchdog_s
        with self._changed:
            ticket = self._next_take
            slot = ticket % len(self._buffers)
            while self._ready[slot] != ticket:
                self._raise_if_over()
                patience.check()
                if time.monotonic() > deadline_s:
                    extent = self._extent_of(ticket)
                    raise StalledError(
                        f"no bytes of {extent.title} from {extent.path} for "
                        f"{patience.watchdog_s:.0f} s; {self._stage_of(ticket).value}"
                    )
                self._changed.wait(min(TICK_S, patience.watchdog_s))
            self._next_take += 1
        extent = self._extent_of(ticket)
        return extent, self._buffers[slot][: extent.length_bytes]

    def take_all(self, patience: Patience) -> Iterator[tuple[Extent, memoryview]]:
        """`take` as often as there are tickets; each buffer is to be released in the loop."""
        assert self._num_tickets is not None
        for _ in range(self._num_tickets):
            yield self.take(patience)

    def release(self, fence: Fence | None) -> None:
        """Give back the oldest taken buffer; it is read into again once `fence` has passed."""
        with self._changed:
            slot = self._released % len(self._buffers)
            self._ready[slot] = None
            self._fences[slot] = fence
            self._released += 1
            self._changed.notify_all()

    def stop(self, *, timeout_s: float = 30.0) -> None:
        """Stop and join the readers. Raises StalledError if one is stuck in the kernel."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - time.monotonic()))
        if stuck := [thread.name for thread in self._threads if thread.is_alive()]:
            raise StalledError(f"{', '.join(stuck)} did not end within {timeout_s:.0f} s")

    def _stage_of(self, ticket: int) -> _Stage:
        return (
            self._stages[ticket % len(self._buffers)]
            if ticket < self._next_claim
            else _Stage.WAITING
        )

    def _raise_if_over(self) -> None:
        if self._error is not None:
            if isinstance(self._error, StreamError):
                raise type(self._error)(str(self._error)) from self._error
            raise StreamError(f"a reader thread died: {self._error!r}") from self._error
        if self._stopping:
            raise StreamError("the stream was stopped while a layer was awaited")

    def _claim(self) -> tuple[int, Fence | None] | None:
        with self._changed:
            while not self._stopping and self._error is None:
                if self._next_claim == self._num_tickets:
                    break
                if self._next_claim < self._released + len(self._buffers):
                    ticket = self._next_claim
                    self._next_claim += 1
                    slot = ticket % len(self._buffers)
                    fence, self._fences[slot] = self._fences[slot], None
                    self._stages[slot] = _Stage.FENCE
                    return ticket, fence
                self._changed.wait()
        return None

    def _read_loop(self) -> None:
        try:
            while (claimed := self._claim()) is not None:
                ticket, fence = claimed
                if fence is not None:
                    fence.wait()
                slot = ticket % len(self._buffers)
                self._stages[slot] = _Stage.READING
                extent = self._extent_of(ticket)
                begin_s = time.perf_counter()
                self._reader.read(
                    extent.path, extent.offset_bytes, extent.length_bytes, self._buffers[slot]
                )
                if self._on_read is not None:
                    self._on_read(extent, begin_s, time.perf_counter())
                with self._changed:
                    self._ready[slot] = ticket
                    self._changed.notify_all()
        except BaseException as error:  # any end of a reader must wake the consumer
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
