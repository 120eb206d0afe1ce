"""A generation as an iterator of text: it runs in a thread and waits while nobody reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from queue import SimpleQueue
from typing import Any

from layerpack.runtime.core.interrupts import start_threads

_END = object()


def iterate(generate: Callable[[Callable[[str], None]], Any]) -> Generator[str, None, None]:
    """The pieces that `generate(on_text)` hands to `on_text`, as they come.

    An error of `generate` is raised here. Closing the iterator early (leaving its loop does)
    stops the generation at its next piece of text and waits for that.
    """
    # Simple queues alone: Ctrl-C in the middle of another one can leave its lock taken for good.
    pieces: SimpleQueue[Any] = SimpleQueue()
    room: SimpleQueue[None] = SimpleQueue()
    stopping = threading.Event()
    errors: list[BaseException] = []

    def on_text(piece: str) -> None:
        if not stopping.is_set():  # afterwards nobody makes room
            room.get()
        if stopping.is_set():
            raise KeyboardInterrupt  # what ends a generation early, in good order
        pieces.put(piece)

    def work() -> None:
        try:
            generate(on_text)
        except BaseException as error:  # raised again in the reader's thread
            errors.append(error)
        finally:
            pieces.put(_END)

    thread = threading.Thread(target=work, name="layerpack-generate", daemon=True)
    try:
        start_threads(thread)
        room.put(None)  # one piece ahead
        while True:
            room.put(None)
            if (piece := pieces.get()) is _END:
                break
            yield piece
    finally:
        stopping.set()
        room.put(None)
        if thread.ident is not None:
            thread.join()
    if errors:
        raise errors[0]
