"""One job a file, several at once, and the first error ends all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
ReportBytes = Callable[[int], None]
"""Takes the bytes done since the last call."""
ProgressCallback = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from several threads but one at a time."""


class _StoppedError(Exception):
    """Another job failed, so this one ends. Never leaves this module."""


def for_each_file(
    items: Sequence[T],
    work: Callable[[T, ReportBytes], R],
    *,
    num_threads: int,
    total_bytes: int,
    progress: ProgressCallback | None = None,
) -> list[R]:
    """`work(item, report)` for each item, begun in this order; the results in the same. Waits.

    An error, Ctrl-C too, ends the other jobs at their next `report` and is raised as it is.
    """
    stopping, lock, done_bytes = threading.Event(), threading.Lock(), 0

    def report(count_bytes: int) -> None:
        nonlocal done_bytes
        if stopping.is_set():
            raise _StoppedError
        with lock:
            done_bytes += count_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)

    with ThreadPoolExecutor(num_threads, thread_name_prefix="layerpack-file") as pool:
        futures = [pool.submit(work, item, report) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stopping.set()
            for future in futures:
                future.cancel()
            raise
