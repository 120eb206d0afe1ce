"""A trace as the JSON that Perfetto (ui.perfetto.dev) and chrome://tracing open: a row a thread."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerpack.formats.errors import TargetError
from layerpack.runtime.trace import Span

_FIRST_ROWS = ("step", "forward", "wait", "bind", "feed", "gpu copy", "gpu compute")


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """The document; times in microseconds from the first span."""
    rows = list(dict.fromkeys(_FIRST_ROWS)) + sorted({s.row for s in spans} - set(_FIRST_ROWS))
    row_ids = {row: number for number, row in enumerate(rows)}
    zero_s = min((span.begin_s for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for row in rows:
        if any(span.row == row for span in spans):
            events.append(_metadata("thread_name", row_ids[row], {"name": row}))
            sort = {"sort_index": row_ids[row]}
            events.append(_metadata("thread_sort_index", row_ids[row], sort))
    events += [
        {
            "name": span.name,
            "ph": "X",
            "pid": 1,
            "tid": row_ids[span.row],
            "ts": (span.begin_s - zero_s) * 1e6,
            "dur": (span.end_s - span.begin_s) * 1e6,
            "args": {"bytes": span.moved_bytes},
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


def _metadata(name: str, row: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": 1, "tid": row, "args": arguments}
