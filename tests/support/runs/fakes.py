"""Streams that really run beside each other, without a GPU: threads with queues, and delays."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import torch


class ThreadStream:
    """Runs what is ordered, in order, in a thread of its own, with random pauses between."""

    def __init__(self, rng: random.Random, longest_pause_s: float) -> None:
        self._queue: queue.Queue[Callable[[], Any] | None] = queue.Queue()
        self._rng = rng
        self._longest_pause_s = longest_pause_s
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def order(self, work: Callable[[], Any]) -> None:
        self._queue.put(work)

    def drain(self) -> None:
        done = threading.Event()
        self.order(done.set)
        assert done.wait(30)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(30)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            time.sleep(self._rng.random() * self._longest_pause_s)
            work()


class ThreadLane:
    """A lane of two ThreadStreams. Like a CUDA event, an event is what was recorded last."""

    def __init__(
        self,
        *,
        num_slots: int,
        slot_bytes: int,
        seed: int,
        copy_pause_s: float,
        work_pause_s: float,
    ) -> None:
        self.slots = [torch.zeros(slot_bytes, dtype=torch.uint8) for _ in range(num_slots)]
        self.copies = ThreadStream(random.Random(seed), copy_pause_s)
        self.work = ThreadStream(random.Random(seed + 1), work_pause_s)
        self.ready = [_passed() for _ in range(num_slots)]
        self.free = [_passed() for _ in range(num_slots)]

    def begin_copy(self, slot: int) -> None:
        self.copies.order(self.free[slot].wait)

    def copy(self, slot: int, offset_bytes: int, source: torch.Tensor) -> None:
        target = self.slots[slot][offset_bytes : offset_bytes + source.numel()]
        self.copies.order(lambda: target.copy_(source))

    def end_copy(self, slot: int) -> None:
        event = self.ready[slot] = threading.Event()
        self.copies.order(event.set)

    def fence(self) -> Any:
        event = threading.Event()
        self.copies.order(event.set)
        return event

    def wait_ready(self, slot: int) -> None:
        self.work.order(self.ready[slot].wait)

    def mark_free(self, slot: int) -> None:
        event = self.free[slot] = threading.Event()
        self.work.order(event.set)

    def drain(self) -> None:
        self.copies.drain()
        self.work.drain()

    def close(self) -> None:
        self.copies.close()
        self.work.close()


def _passed() -> threading.Event:
    event = threading.Event()
    event.set()
    return event
