"""What the GPU's own clock says: when copies and layers really ran, as spans of the trace."""

from __future__ import annotations

import time

import torch

from layerpack.runtime.trace import Trace


class GpuClock:
    """Collects pairs of timing events; `resolve` turns them into spans once the GPU is idle.

    A pair costs two event records. Only the profile has one of these.
    """

    def __init__(self, device: torch.device, trace: Trace) -> None:
        self._trace = trace
        self._device = device
        self._pairs: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event, int]] = []
        self._zero = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        self._zero.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        self._zero_s = time.perf_counter()

    def begin(self, stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
        """An event here on `stream` (default: the current one)."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream(self._device))
        return event

    def end(
        self,
        row: str,
        name: str,
        begin: torch.cuda.Event,
        *,
        stream: torch.cuda.Stream | None = None,
        moved_bytes: int = 0,
    ) -> None:
        """Close the span that began at `begin`."""
        self._pairs.append((row, name, begin, self.begin(stream), moved_bytes))

    def resolve(self) -> None:
        """Wait for the device and hand all spans to the trace."""
        torch.cuda.synchronize(self._device)
        pairs, self._pairs = self._pairs, []
        for row, name, begin, end, moved_bytes in pairs:
            begin_s = self._zero_s + self._zero.elapsed_time(begin) / 1000
            end_s = self._zero_s + self._zero.elapsed_time(end) / 1000
            self._trace.span(row, name, begin_s, end_s, moved_bytes)
