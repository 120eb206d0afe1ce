"""A ring of host buffers between the threads that read the disk and the one that feeds the device.

The pieces of a pass have tickets 0, 1, 2 …; ticket t uses buffer t % num_slots. Readers finish in
any order, the consumer takes in ticket order. Nothing here knows torch: a buffer is a memoryview,
a fence anything with `wait()`, so all of it is tested without a GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum
from types import TracebackType
from typing import Protocol

from layerpack.formats.errors import StalledError, StreamError
from layerpack.formats.read import Reader
from layerpack.runtime.core.interrupts import deferred_interrupts, start_threads
from layerpack.runtime.core.pieces import Piece


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

    `piece_of(ticket)` names what to read for a ticket; it is pure and may be called from any
    reader thread. Tickets go on without end, or up to `num_tickets`. The first error of a reader
    is kept whole and raised by `take`. As a context manager it starts, and stops at the end.
    """

    def __init__(
        self,
        *,
        buffers: list[memoryview],
        reader: Reader,
        piece_of: Callable[[int], Piece],
        num_threads: int,
        num_tickets: int | None = None,
        on_read: Callable[[Piece, float, float], None] | None = None,
    ) -> None:
        self._buffers = buffers
        self._reader = reader
        self._piece_of = piece_of
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

    def __enter__(self) -> ReadRing:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to read ahead, as far as there are buffers."""
        start_threads(*self._threads)

    def take(self, *, timeout_s: float) -> tuple[Piece, memoryview]:
        """The next ticket's piece and its bytes; waits. The buffer is the caller's until `release`.

        Raises StreamError with the cause if a reader failed, StalledError after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            ticket = self._next_take
            slot = ticket % len(self._buffers)
            while self._ready[slot] != ticket:
                self._raise_if_over()
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    piece = self._piece_of(ticket)
                    raise StalledError(
                        f"no bytes of {piece.title} from {piece.path} for {timeout_s:.0f} s; "
                        f"{self._stage_of(ticket).value}"
                    )
            self._next_take += 1
        piece = self._piece_of(ticket)
        return piece, self._buffers[slot][: piece.length_bytes]

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
        with deferred_interrupts():
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            deadline = time.monotonic() + timeout_s
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - time.monotonic()))
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
                piece = self._piece_of(ticket)
                begin_s = time.perf_counter()
                self._reader.read(
                    piece.path, piece.offset_bytes, piece.length_bytes, self._buffers[slot]
                )
                if self._on_read is not None:
                    self._on_read(piece, begin_s, time.perf_counter())
                with self._changed:
                    self._ready[slot] = ticket
                    self._changed.notify_all()
        except BaseException as error:  # any end of a reader must wake the consumer
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
