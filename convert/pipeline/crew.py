"""A few named threads that work on one thing: the first error stops all of them, none is left."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_JOIN_S = 0.5  # Windows lets Ctrl-C through only between two waits


class StoppedError(Exception):
    """Another thread failed, so this one is to end. Never leaves the crew."""


class Crew:
    """Threads that share one condition. Use as a context manager: leaving it stops and joins all.

    An error in a thread is raised, as it is, where the block ends.
    """

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self._stopped = False
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Run `work` in a thread called `layerpack-NAME`."""

        def run() -> None:
            try:
                work()
            except StoppedError:
                pass
            except BaseException as error:
                self.stop(error)

        thread = threading.Thread(target=run, name=f"layerpack-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self, error: BaseException | None = None) -> None:
        """Let every wait end with StoppedError. The first error given is kept."""
        with self.condition:
            if not self._stopped:
                self._stopped, self._error = True, error
            self.condition.notify_all()

    def check(self) -> None:
        """Raise StoppedError if the crew was stopped: for loops that do not wait."""
        if self._stopped:
            raise StoppedError

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait, with `condition` held, until `ready()`. Raises StoppedError."""
        while not ready():
            self.check()
            self.condition.wait()
        self.check()

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        try:
            if kind is None:
                self._join()
        finally:
            self.stop(None if isinstance(error, StoppedError) else error)
            self._join()
        if self._error is not None and self._error is not error:
            raise self._error
        return isinstance(error, StoppedError)

    def _join(self) -> None:
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_JOIN_S)


class Channel(Generic[T]):
    """Hands things from one thread to another, at most `capacity` of them waiting."""

    def __init__(self, crew: Crew, capacity: int) -> None:
        self._crew, self._capacity = crew, capacity
        self._items: deque[T] = deque()
        self._closed = False

    def put(self, item: T) -> None:
        """Wait for room, then add. Raises StoppedError."""
        with self._crew.condition:
            self._crew.wait(lambda: len(self._items) < self._capacity)
            self._items.append(item)
            self._crew.condition.notify_all()

    def close(self) -> None:
        """No more will come: iterating ends after what is there."""
        with self._crew.condition:
            self._closed = True
            self._crew.condition.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Take, waiting for each, until closed. Raises StoppedError."""
        while True:
            with self._crew.condition:
                self._crew.wait(lambda: bool(self._items) or self._closed)
                if not self._items:
                    return
                item = self._items.popleft()
                self._crew.condition.notify_all()
            yield item
            del item  # the next wait must not keep a tensor alive
