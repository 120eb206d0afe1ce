"""What the GPU's own clock says: when copies and layers really ran, as spans of the trace."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch

from layerpack.runtime.trace.trace import GPU_COMPUTE_ROW, GPU_COPY_ROW, GPU_WAIT_ROW, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    row: str
    name: str
    begin: torch.cuda.Event
    end: torch.cuda.Event
    moved_bytes: int


class GpuClock:
    """Pairs of timing events around work; `collect` turns those that have passed into spans.

    Only a profile has one of these. A pair costs two event records and makes nobody wait. Any
    thread may begin and end spans, one thread collects.
    """

    def __init__(
        self, device: torch.device, trace: Trace, *, copy_stream: torch.cuda.Stream | None
    ) -> None:
        self._device = device
        self._trace = trace
        self._copy_stream = copy_stream
        # One queue a row: within a row work ends in the order in which it was given.
        self._pending: dict[str, deque[_Timed]] = {
            row: deque() for row in (GPU_COPY_ROW, GPU_WAIT_ROW, GPU_COMPUTE_ROW)
        }
        torch.cuda.synchronize(device)
        self._zero = self.begin(GPU_COMPUTE_ROW)
        self._zero.synchronize()
        self._zero_s = time.perf_counter()

    def begin(self, row: str) -> torch.cuda.Event:
        """The point that `row`'s stream reaches next. Waits not."""
        event = torch.cuda.Event(enable_timing=True)
        if row == GPU_COPY_ROW and self._copy_stream is not None:
            event.record(self._copy_stream)
        else:
            event.record(torch.cuda.current_stream(self._device))
        return event

    def end(
        self, row: str, name: str, begin: torch.cuda.Event, moved_bytes: int = 0
    ) -> torch.cuda.Event:
        """Close the span that began at `begin`; the point where it ends. Waits not."""
        end = self.begin(row)
        self._pending[row].append(
            _Timed(row=row, name=name, begin=begin, end=end, moved_bytes=moved_bytes)
        )
        return end

    def collect(self) -> None:
        """Hand what has run to the trace. Waits not."""
        for pending in self._pending.values():
            while pending and pending[0].end.query():
                timed = pending.popleft()
                self._trace.span(
                    timed.row,
                    timed.name,
                    self._at(timed.begin),
                    self._at(timed.end),
                    timed.moved_bytes,
                )

    def finish(self) -> None:
        """Wait for the device and hand over all that it has done."""
        torch.cuda.synchronize(self._device)
        self.collect()

    def _at(self, event: torch.cuda.Event) -> float:
        return self._zero_s + float(self._zero.elapsed_time(event)) / 1000
