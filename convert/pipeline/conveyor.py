"""Work done by several threads at a time whose results come out in the order it was given in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from layerpack.convert.pipeline.crew import Crew

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Job(Generic[T]):
    """WAITING -a thread takes it-> RUNNING -> DONE -next in order-> gone"""

    work: Callable[[], T]
    memory_bytes: int
    result: tuple[T] | None = None


class Conveyor(Generic[T]):
    """Jobs in by `put`, done by any number of threads in `work_all`, results out by iterating.

    At most `max_jobs` are on it, with at most `max_bytes` of memory; a job that is larger than that
    is let on alone.
    """

    def __init__(self, crew: Crew, *, max_jobs: int, max_bytes: int) -> None:
        self._crew = crew
        self._max_jobs, self._max_bytes = max_jobs, max_bytes
        self._jobs: deque[_Job[T]] = deque()
        self._waiting: deque[_Job[T]] = deque()
        self._bytes = 0
        self._closed = False

    def put(self, work: Callable[[], T], memory_bytes: int) -> None:
        """Wait for room, then add. Raises StoppedError."""

        def has_room() -> bool:
            fits = self._bytes + memory_bytes <= self._max_bytes
            return not self._jobs or (fits and len(self._jobs) < self._max_jobs)

        with self._crew.condition:
            self._crew.wait(has_room)
            job = _Job(work, memory_bytes)
            self._jobs.append(job)
            self._waiting.append(job)
            self._bytes += memory_bytes
            self._crew.condition.notify_all()

    def close(self) -> None:
        """No more will come: threads and iteration end after what is there."""
        with self._crew.condition:
            self._closed = True
            self._crew.condition.notify_all()

    def work_all(self) -> None:
        """A thread's life: do jobs until there are no more. Raises StoppedError, or a job's own."""
        while True:
            with self._crew.condition:
                self._crew.wait(lambda: bool(self._waiting) or self._closed)
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            result = job.work()
            with self._crew.condition:
                job.result = (result,)
                self._crew.condition.notify_all()
            del job, result  # the next wait must not keep a tensor alive

    def __iter__(self) -> Iterator[T]:
        """Results in order, waiting for each, until closed. Raises StoppedError."""
        while True:
            with self._crew.condition:
                self._crew.wait(lambda: self._is_next_done() or (self._closed and not self._jobs))
                if not self._jobs:
                    return
                job = self._jobs[0]
            assert job.result is not None
            yield job.result[0]
            with self._crew.condition:  # its memory was the taker's until now
                self._jobs.popleft()
                self._bytes -= job.memory_bytes
                self._crew.condition.notify_all()
            del job

    def _is_next_done(self) -> bool:
        return bool(self._jobs) and self._jobs[0].result is not None
