"""Faults to inject where bytes are read, and the check that nothing is left of a broken run."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from layerpack.runtime.stream.lane import HostLane

PREFIX = "layerpack-"
WORDS = "CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA` to enable"
LANE_CALLS = ("begin_copy", "copy", "end_copy", "fence", "wait_ready", "mark_free", "drain")


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


def fail(*_: object, **__: object) -> Any:
    """What torch raises from whichever call comes first, and from every one after it."""
    raise torch.AcceleratorError(WORDS)


def break_lane(monkeypatch: pytest.MonkeyPatch, call: str, after: int) -> None:
    """Let `call` fail once it was made `after` times, and each call of the lane from then on."""
    state = {"left": after, "failed": False}

    def breaking(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if name == call:
                state["left"] -= 1
                state["failed"] |= state["left"] < 0
            return fail() if state["failed"] else real(*arguments)

        return wrapped

    for name in LANE_CALLS:
        monkeypatch.setattr(HostLane, name, breaking(name, getattr(HostLane, name)))


def after_interrupt(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with a real Ctrl-C as it is called for the first time, in any thread."""
    calls: list[int] = []

    def wrapped(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments, **named)

    return wrapped


def threads() -> list[str]:
    """Names of our own threads that are alive."""
    return sorted(t.name for t in threading.enumerate() if t.name.startswith(PREFIX))


def wait_for_threads(within_s: float = 10.0) -> None:
    """Until none of our own threads is alive, or so long."""
    end_s = time.monotonic() + within_s
    while threads() and time.monotonic() < end_s:
        time.sleep(0.01)


def mappings(folder: Path) -> int:
    """How many files of `folder` are mapped, a file counting as often as it is."""
    return Path("/proc/self/maps").read_text().count(f"{folder}/")


def open_files(folder: Path) -> list[str]:
    """Files of `folder` that are open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself is closed by now
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [path for path in found if path.startswith(f"{folder}/")]


@contextmanager
def nothing_left(folder: Path, within_s: float = 20.0) -> Iterator[None]:
    """The block ends in bounded time, and leaves no thread, open file, or mapping of `folder`."""
    begin_s = time.monotonic()
    yield
    assert time.monotonic() - begin_s < within_s
    assert threads() == []
    if mappings(folder):
        gc.collect()  # frames of an exception hold on to what they saw
    assert mappings(folder) == 0
    assert open_files(folder) == []
