"""One line on a terminal while somebody waits for what has nothing to show yet."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from layerpack.cli.progress import thin_bar


class SignOfLife:
    """`say` what is going on, in place of what was said before; `over` when there is more to see.

    After `over` only `say` shows something again, a bar does not: text may stand on the line.
    Standard error gets nothing where it is no terminal.
    """

    def __init__(self) -> None:
        self._said = False
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Show it now."""
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            sys.stderr.write(f"\r\x1b[K{text[: width - 1]}")
            sys.stderr.flush()
            self._said = True

    def bar(self, text: str, done: int, total: int, unit: str) -> None:
        """What was said last goes on, and is so far."""
        if not self._said:
            return
        if self._bar is None:
            self._bar = thin_bar(
                desc=text,
                total=total,
                bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} " + unit,
            )
        self._bar.n = done
        self._bar.refresh()

    def over(self) -> None:
        """Leave an empty line to write on."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._said:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._said = False


@contextmanager
def sign_of_life(text: str) -> Iterator[SignOfLife]:
    """Says `text`; whatever stands there last goes with the block."""
    life = SignOfLife()
    life.say(text)
    try:
        yield life
    finally:
        life.over()
