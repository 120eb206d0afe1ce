"""Faults to inject where bytes are read, and the check that nothing is left of a broken run."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

PREFIX = "layerpack-"


class Disk:
    """Stands in for `os.preadv`; once armed, the reads after the next `after` ones go wrong.

    `error`: EIO. `short`: the file ends in the middle of the read. `death`: the thread dies.
    `hang`: the read takes a second.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = os.preadv
        self._kind: str | None = None
        self._left = 0
        self._lock = threading.Lock()
        monkeypatch.setattr(os, "preadv", self._preadv)

    def arm(self, kind: str, after: int = 0) -> None:
        self._left = after
        self._kind = kind

    def disarm(self) -> None:
        self._kind = None

    def _preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            kind = self._kind
            self._left -= kind is not None
        if kind is None or self._left >= 0:
            return self._real(descriptor, buffers, offset)
        if kind == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if kind == "death":
            raise MemoryError("injected")
        if kind == "short":
            return max(0, self._real(descriptor, buffers, offset) - 4097)
        time.sleep(1)
        return self._real(descriptor, buffers, offset)


def threads() -> list[str]:
    """Names of our own threads that are alive."""
    return sorted(t.name for t in threading.enumerate() if t.name.startswith(PREFIX))


def mappings(folder: Path) -> int:
    """How many files of `folder` are mapped, a file counting as often as it is."""
    return Path("/proc/self/maps").read_text().count(f"{folder}/")


@contextmanager
def nothing_left(folder: Path, within_s: float = 20.0) -> Iterator[None]:
    """The block ends in bounded time, and leaves no thread, open file, or mapping of `folder`."""
    files = len(os.listdir("/proc/self/fd"))
    begin_s = time.monotonic()
    yield
    assert time.monotonic() - begin_s < within_s
    assert threads() == []
    if len(os.listdir("/proc/self/fd")) != files or mappings(folder):
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == files
        assert mappings(folder) == 0
