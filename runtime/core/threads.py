"""Threads whose results and errors reach whoever waits, and one that does all of a model's work.

The calling thread only waits, on queues without locks of their own: Ctrl-C is raised there, and
finds nothing half done. What is under way is told to end, at a point of its own choosing.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from layerpack.formats.errors import StalledError
from layerpack.runtime.core.patience import TICK_S, Patience

T = TypeVar("T")
_JOIN_S = 90.0  # more than any watchdog's, so that its error is the one that is seen


class Job(Generic[T]):
    """WAITING -a thread takes it-> RUNNING -> DONE; `cancel` asks for an early end."""

    def __init__(self, work: Callable[[], T], on_end: Callable[[], object] | None = None) -> None:
        self.cancelled = threading.Event()
        self._work, self._on_end = work, on_end
        self.over = False
        # Only wakes who waits: Ctrl-C can come as somebody has just taken what is in it.
        self._done: SimpleQueue[None] = SimpleQueue()
        self._value: T
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, name: str) -> None:
        """Do the work in a thread of its own, called `layerpack-NAME`. Waits not."""
        self._thread = threading.Thread(target=self.run, name=f"layerpack-{name}", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Do the work, in the thread that calls. Raises nothing."""
        try:
            self._value = self._work()
        except BaseException as error:  # raised again in the thread that waits
            self._error = error
        finally:
            if self._on_end is not None:
                self._on_end()
            self.over = True
            self._done.put(None)

    def cancel(self) -> None:
        """Ask the work to end. Waits not."""
        self.cancelled.set()

    def ended(self, within_s: float) -> bool:
        """Whether the work is over; waits for it so long."""
        if not self.over:
            with contextlib.suppress(Empty):
                self._done.get(timeout=within_s)
        if self.over:
            self._done.put(None)  # for whoever waits beside
            if self._thread is not None:
                self._thread.join()
        return self.over

    @property
    def failed(self) -> bool:
        """Whether it ended in an error."""
        return self._error is not None

    def wait(self) -> T:
        """What the work gave; waits. Raises what it raised."""
        while not self.ended(TICK_S):  # on Windows Ctrl-C comes through only between two waits
            continue
        if self._error is not None:
            raise self._error
        return self._value

    def result(self) -> T:
        """The same. Ctrl-C cancels it, and is raised once it has ended; a second one at once."""
        try:
            return self.wait()
        except KeyboardInterrupt:
            self.cancel()
            with contextlib.suppress(Exception):  # it was given up
                self.wait()
            raise


def beside(name: str, work: Callable[[], T]) -> Job[T]:
    """Do the work in a thread of its own, beginning now."""
    job = Job(work)
    job.start(name)
    return job


class Worker:
    """One thread that does jobs in the order in which they come. `close` when done.

    `patience` is that of whatever the jobs wait for.
    """

    def __init__(self, name: str, patience: Patience) -> None:
        self._patience = patience
        self._jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._life = beside(name, self._live)

    def submit(
        self, work: Callable[[], T], *, on_end: Callable[[], object] | None = None
    ) -> Job[T]:
        """Queue the work; `on_end()` follows it, however it ended. Waits not."""
        job = Job(work, on_end)
        self._jobs.put(job)
        return job

    def call(self, work: Callable[[], T]) -> T:
        """Do it, after what was queued before; waits. Raises what it raises."""
        return self.submit(work).result()

    def close(self) -> None:
        """End the thread; waits for what is queued. Raises StalledError if it is stuck."""
        self._jobs.put(None)
        if not self._life.ended(_JOIN_S):
            raise StalledError(f"the model's thread did not end within {_JOIN_S:.0f} s")

    def _live(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._patience.watch(job.cancelled)
            job.run()
            del job  # the next wait must not keep what it holds alive


def in_order(
    work: Callable[[T], object],
    items: Iterable[T],
    *,
    num_threads: int,
    patience: Patience,
    stalled: Callable[[T], str],
) -> Iterator[T]:
    """`work(item)` for each item, several at once; each item in its order, once it is done.

    Raises what the work raises, CancelledError, and StalledError with the words of `stalled` for an
    item that takes too long; nothing more is begun then.
    """
    waiting: SimpleQueue[Job[object] | None] = SimpleQueue()
    under_way: deque[tuple[T, Job[object]]] = deque()
    over = threading.Event()

    def live() -> None:
        while (job := waiting.get()) is not None and not over.is_set():
            job.run()

    def oldest() -> T:
        item, job = under_way.popleft()
        deadline_s = time.monotonic() + patience.watchdog_s
        while not job.ended(min(TICK_S, patience.watchdog_s)):
            patience.check()
            if time.monotonic() > deadline_s:
                raise StalledError(stalled(item))
        job.wait()
        return item

    lives = [beside(f"each-{number}", live) for number in range(num_threads)]
    try:
        for item in items:
            job: Job[object] = Job(functools.partial(work, item))
            under_way.append((item, job))
            waiting.put(job)
            if len(under_way) > 2 * num_threads:
                yield oldest()
        while under_way:
            yield oldest()
    finally:
        over.set()
        for _ in lives:
            waiting.put(None)
        for life in lives:
            life.ended(patience.watchdog_s)  # what is stuck was told already
