"""When a layer waited for its bytes and when it ran, by the host's clock and by the device's."""

from __future__ import annotations

import time
from typing import Any

from layerpack.runtime.trace.trace import GPU_COMPUTE_ROW, GPU_WAIT_ROW, Trace


class LayerSpans:
    """await_bytes -arrived-> begin -end-> and the next; a resident layer begins at once.

    One layer at a time. Without a profile each call is an attribute looked up.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._begin_s = 0.0
        self._mark: Any = None  # where on the device the span that is open began

    def await_bytes(self) -> None:
        """What is ordered next waits for the slice's copies."""
        self._mark = self._trace.clock.begin(GPU_WAIT_ROW)

    def arrived(self, title: str) -> None:
        """What is ordered next sees the slice."""
        self._mark = self._trace.clock.end(GPU_WAIT_ROW, title, self._mark)

    def begin(self, *, resident: bool) -> None:
        """The layer's work is ordered from here on."""
        if not self._trace.enabled:
            return
        self._begin_s = time.perf_counter()
        if resident:
            self._mark = self._trace.clock.begin(GPU_COMPUTE_ROW)

    def end(self, title: str) -> None:
        """All of it is ordered."""
        self._trace.forward(title, self._begin_s, time.perf_counter())
        self._trace.clock.end(GPU_COMPUTE_ROW, title, self._mark)
