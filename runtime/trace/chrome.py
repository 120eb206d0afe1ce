"""A trace as the JSON that Perfetto (ui.perfetto.dev) and chrome://tracing open: a row a thread."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerpack.formats.errors import TargetError
from layerpack.runtime.trace.trace import (
    BIND_ROW,
    FEED_ROW,
    FORWARD_ROW,
    GPU_COMPUTE_ROW,
    GPU_COPY_ROW,
    GPU_WAIT_ROW,
    PROPOSE_ROW,
    STEP_ROW,
    WAIT_ROW,
    Span,
)

_FIRST_ROWS = (
    STEP_ROW,
    PROPOSE_ROW,
    GPU_COMPUTE_ROW,
    GPU_WAIT_ROW,
    GPU_COPY_ROW,
    FORWARD_ROW,
    BIND_ROW,
    WAIT_ROW,
    FEED_ROW,
)


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """The document; times in microseconds from the first span."""
    used = {span.row for span in spans}
    rows = [row for row in _FIRST_ROWS if row in used] + sorted(used - set(_FIRST_ROWS), key=_place)
    row_ids = {row: number for number, row in enumerate(rows, start=1)}
    zero_s = min((span.begin_s for span in spans), default=0.0)
    events = [_metadata("process_name", 0, {"name": "layerpack"})]
    for row, number in row_ids.items():
        events.append(_metadata("thread_name", number, {"name": row}))
        events.append(_metadata("thread_sort_index", number, {"sort_index": number}))
    events += [
        {
            "name": span.name,
            "ph": "X",
            "pid": 1,
            "tid": row_ids[span.row],
            "ts": (span.begin_s - zero_s) * 1e6,
            "dur": (span.end_s - span.begin_s) * 1e6,
            "args": {"bytes": span.moved_bytes} if span.moved_bytes else {},
        }
        for span in spans
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_chrome_trace(spans: Sequence[Span], path: Path) -> None:
    """Write the document to `path`. Raises TargetError."""
    try:
        path.write_text(json.dumps(chrome_trace(spans)))
    except OSError as reason:
        raise TargetError(f"{path}: the trace cannot be written ({reason.strerror})") from reason


def _place(row: str) -> tuple[str, int]:
    """`layerpack-read-10` after `layerpack-read-9`."""
    name, _, number = row.rpartition("-")
    return (name, int(number)) if number.isdigit() else (row, 0)


def _metadata(name: str, row: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": 1, "tid": row, "args": arguments}
