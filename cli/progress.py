"""Bytes done of all bytes: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from layerpack.formats.units import human_bytes

_LINE_EVERY_S = 30.0


@contextmanager
def byte_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a callback that takes bytes done and bytes in all; draws on standard error.

    What is done at the first call was done earlier, and is left out of the speed.
    """
    shown = _Bar(title) if sys.stderr.isatty() else _Lines(title)
    try:
        yield shown.update
    finally:
        shown.close()


def thin_bar(**how: Any) -> Any:
    """tqdm's bar on standard error, as wide as the terminal, gone when it is closed."""
    from tqdm import tqdm

    return tqdm(dynamic_ncols=True, leave=False, file=sys.stderr, **how)


@contextmanager
def window_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of windows on a terminal, gone when they are done; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    with thin_bar(desc=title, total=total, unit="window") as bar:
        bar.refresh()
        yield bar.update


class _Bar:
    """A bar that goes when the work is done. Nothing is drawn before the first call."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Any = None

    def update(self, done_bytes: int, total_bytes: int) -> None:
        if self._bar is None:
            self._bar = thin_bar(
                desc=self._title,
                total=total_bytes,
                initial=done_bytes,
                unit="B",
                unit_scale=True,
            )
        self._bar.update(done_bytes - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Lines:
    """`convert: 32 %, 46.5 GB of 145.4 GB, 21 min left`, twice a minute."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._first: tuple[float, int] | None = None
        self._said_s = 0.0

    def update(self, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if self._first is None:
            self._first, self._said_s = (now_s, done_bytes), now_s
        if now_s - self._said_s < _LINE_EVERY_S:
            return
        self._said_s = now_s
        begin_s, begin_bytes = self._first
        text = (
            f"{self._title}: {100 * done_bytes // max(1, total_bytes)} %, "
            f"{human_bytes(done_bytes)} of {human_bytes(total_bytes)}"
        )
        if done_bytes > begin_bytes:
            left = (total_bytes - done_bytes) / (done_bytes - begin_bytes)
            text += f", {_minutes(left * (now_s - begin_s))} left"
        click.echo(text, err=True)

    def close(self) -> None:
        """Nothing to take away."""


def _minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
