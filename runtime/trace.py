"""When each stage did what: spans that the profile sums up and the trace file draws as rows.

`Trace` records, `NO_TRACE` does not; both are called the same way, so the data path reads the same
with and without a profile. Lists are appended to under the GIL; no lock is needed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """`row` did `name` from `begin_s` to `end_s` (time.perf_counter), moving `moved_bytes`."""

    row: str
    name: str
    begin_s: float
    end_s: float
    moved_bytes: int = 0


class Trace:
    """Collects spans from all threads."""

    enabled = True

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def span(self, row: str, name: str, begin_s: float, end_s: float, moved_bytes: int = 0) -> None:
        """Note one span."""
        self.spans.append(
            Span(row=row, name=name, begin_s=begin_s, end_s=end_s, moved_bytes=moved_bytes)
        )

    def read(self, name: str, begin_s: float, end_s: float, moved_bytes: int) -> None:
        """A disk read, in the row of the reader thread that calls."""
        self.span(threading.current_thread().name, name, begin_s, end_s, moved_bytes)

    def copy(self, name: str, begin_s: float, end_s: float, moved_bytes: int) -> None:
        """The feeder's work for one slice (host side: waiting for bytes, ordering copies)."""
        self.span("feed", name, begin_s, end_s, moved_bytes)

    def wait(self, name: str, begin_s: float, end_s: float) -> None:
        """The forward pass waiting for a slice."""
        self.span("wait", name, begin_s, end_s)

    def bind(self, name: str, begin_s: float, end_s: float) -> None:
        """Weights being bound to a layer."""
        self.span("bind", name, begin_s, end_s)

    def forward(self, name: str, begin_s: float, end_s: float) -> None:
        """A layer's forward, host side."""
        self.span("forward", name, begin_s, end_s)

    def step(self, name: str, begin_s: float, end_s: float) -> None:
        """One whole pass."""
        self.span("step", name, begin_s, end_s)


class _NoTrace(Trace):
    enabled = False

    def span(self, row: str, name: str, begin_s: float, end_s: float, moved_bytes: int = 0) -> None:
        """Nothing is kept."""


NO_TRACE = _NoTrace()
