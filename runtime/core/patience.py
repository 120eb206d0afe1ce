"""How long to wait for what does not come, and whether anybody still wants it."""

from __future__ import annotations

import threading
from typing import Protocol

from layerpack.formats.errors import StreamError

TICK_S = 0.2
"""Who waits looks up so often."""


class CancelledError(StreamError):
    """Whoever waited has given up. Ends the work; users never see it."""


class Flag(Protocol):
    """As threading.Event."""

    def is_set(self) -> bool:
        """Whether nobody waits any more."""

    def set(self) -> None:
        """Nobody waits any more."""


class Patience:
    """Shared by everything that waits on behalf of one job at a time.

    `watchdog_s`: without progress for so long, something stands still for good.
    """

    def __init__(self, watchdog_s: float = 60.0) -> None:
        self.watchdog_s = watchdog_s
        self._cancelled: Flag = threading.Event()

    def watch(self, cancelled: Flag) -> None:
        """From here on `cancelled` tells whether to go on: another job begins."""
        self._cancelled = cancelled

    def cancel(self) -> None:
        """Let every wait, and every `check`, of the present job end."""
        self._cancelled.set()

    def check(self) -> None:
        """Raises CancelledError if nobody wants the present job's result any more."""
        if self._cancelled.is_set():
            raise CancelledError("given up before it was done")
