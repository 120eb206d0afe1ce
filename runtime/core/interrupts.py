"""Ctrl-C held back while something is undone as a whole, and work given up for its sake."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from layerpack.formats.errors import StreamError


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Ctrl-C inside the block takes effect at its end. What is inside must end in bounded time.

    Python runs signal handlers in the main thread only: in any other this does nothing.
    """
    previous: Any = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    caught: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught:
            previous(*caught[0])


def start_threads(*threads: threading.Thread) -> None:
    """Start them. Ctrl-C or not, each is then known to have begun, or has not."""
    with deferred_interrupts():
        for thread in threads:
            thread.start()


def stop_if(cancelled: threading.Event) -> None:
    """Raise StreamError if whoever waits for the weights has given up."""
    if cancelled.is_set():
        raise StreamError("opening was given up before all weights were loaded")
