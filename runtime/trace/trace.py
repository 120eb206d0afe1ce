"""When each stage did what: spans that the profile sums up and the trace file draws as rows.

`Trace` records, `NO_TRACE` does not; both are called the same way, so the data path reads the same
with and without a profile. Lists are appended to under the GIL; no lock is needed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

STEP_ROW, PROPOSE_ROW, FEED_ROW = "step", "propose", "feed"
WAIT_ROW, BIND_ROW, FORWARD_ROW = "wait", "bind", "forward"
GPU_COPY_ROW, GPU_WAIT_ROW, GPU_COMPUTE_ROW = "gpu copy", "gpu wait", "gpu compute"
READ_ROWS = "layerpack-read"
"""What the names of the reader threads begin with; each of them is a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """`row` did `name` from `begin_s` to `end_s` (time.perf_counter), moving `moved_bytes`.

    A step also says how many tokens it gave.
    """

    row: str
    name: str
    begin_s: float
    end_s: float
    moved_bytes: int = 0
    num_tokens: int = 0


class Clock(Protocol):
    """A device's own clock: spans of what runs on it, in the order in which it was ordered."""

    def begin(self, row: str) -> Any:
        """The point that `row` reaches next. Waits not."""

    def end(self, row: str, name: str, begin: Any, moved_bytes: int = 0) -> Any:
        """Close the span that began at `begin`; the point where it ends. Waits not."""

    def collect(self) -> None:
        """Hand what has run to the trace. Waits not."""

    def finish(self) -> None:
        """Wait for the device and hand over all that it has done."""


class NoClock:
    """Times nothing: there is no device with a clock, or nobody asked."""

    def begin(self, row: str) -> None:
        """Nothing."""

    def end(self, row: str, name: str, begin: None, moved_bytes: int = 0) -> None:
        """Nothing."""

    def collect(self) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class Trace:
    """Collects spans from all threads, if `enabled`. `clock` is the device's, where it has one."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.spans: list[Span] = []
        self.clock: Clock = NoClock()

    def span(
        self,
        row: str,
        name: str,
        begin_s: float,
        end_s: float,
        moved_bytes: int = 0,
        num_tokens: int = 0,
    ) -> None:
        """Note one span."""
        if not self.enabled:
            return
        self.spans.append(
            Span(
                row=row,
                name=name,
                begin_s=begin_s,
                end_s=end_s,
                moved_bytes=moved_bytes,
                num_tokens=num_tokens,
            )
        )

    def read(self, name: str, begin_s: float, end_s: float, moved_bytes: int) -> None:
        """A disk read, in the row of the reader thread that calls."""
        self.span(threading.current_thread().name, name, begin_s, end_s, moved_bytes)

    def copy(self, name: str, begin_s: float, end_s: float, moved_bytes: int) -> None:
        """The feeder's work for one slice (host side: waiting for bytes, ordering copies)."""
        self.span(FEED_ROW, name, begin_s, end_s, moved_bytes)

    def wait(self, name: str, begin_s: float, end_s: float) -> None:
        """The forward pass waiting for a slice."""
        self.span(WAIT_ROW, name, begin_s, end_s)

    def bind(self, name: str, begin_s: float, end_s: float) -> None:
        """Weights being bound to a layer."""
        self.span(BIND_ROW, name, begin_s, end_s)

    def forward(self, name: str, begin_s: float, end_s: float) -> None:
        """A layer's forward, host side."""
        self.span(FORWARD_ROW, name, begin_s, end_s)

    def propose(self, begin_s: float, end_s: float) -> None:
        """A draft, or prompt lookup, choosing the tokens to try in the next pass."""
        self.span(PROPOSE_ROW, "propose", begin_s, end_s)

    def step(self, begin_s: float, end_s: float, num_tokens: int) -> None:
        """One pass from its beginning until the tokens that it gave are known."""
        self.span(STEP_ROW, f"{num_tokens} tokens", begin_s, end_s, num_tokens=num_tokens)


NO_TRACE = Trace(enabled=False)
