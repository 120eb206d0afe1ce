"""A trace summed up per step: what waited for what, and how close each link came to its limit."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from layerpack.runtime.machine.machine import Machine
from layerpack.runtime.trace.trace import (
    BIND_ROW,
    FEED_ROW,
    FORWARD_ROW,
    GPU_COMPUTE_ROW,
    GPU_COPY_ROW,
    GPU_WAIT_ROW,
    PROPOSE_ROW,
    READ_ROWS,
    STEP_ROW,
    WAIT_ROW,
    Span,
)

_MEANINGS = {
    "read": "some reader thread at work",
    "wait": "layers waiting for their bytes",
    "bind": "the host preparing layers",
    "forward": "the host ordering them (on a CPU: computing)",
    "copy": "the GPU's stream of copies at work",
    "compute": "its stream of computation at work",
    "propose": "a draft choosing tokens",
    "wall": "the pass",
    "total": "all of it, until the tokens are known",
}
_MEDIAN_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """One step: a pass, from its beginning until its tokens are known. Times in seconds.

    `read_s` is the time during which at least one reader thread was reading; `wait_s` layers
    waiting for their bytes, by the GPU's clock where there is one; `bind_s` and `forward_s` the
    host's work for the layers. `copy_s` and `compute_s` are the GPU's two streams at work (0 on
    a CPU); `propose_s` a draft; `total_s` all of the step by the wall clock.
    """

    number: int
    num_tokens: int
    read_s: float
    wait_s: float
    bind_s: float
    forward_s: float
    copy_s: float
    compute_s: float
    propose_s: float
    total_s: float
    disk_bytes: int
    link_bytes: int

    @property
    def wall_s(self) -> float:
        """The pass itself, without what proposed its tokens."""
        return self.total_s - self.propose_s


def profile_steps(spans: Iterable[Span]) -> list[StepProfile]:
    """One StepProfile for each step. A span belongs to the step in which it began."""
    spans = sorted(spans, key=lambda span: span.begin_s)
    steps = [span for span in spans if span.row == STEP_ROW]
    begins = [step.begin_s for step in steps]
    inside: list[list[Span]] = [[] for _ in steps]
    for span in spans:
        place = bisect_right(begins, span.begin_s) - 1
        if span.row != STEP_ROW and place >= 0 and span.begin_s < steps[place].end_s:
            inside[place].append(span)
    return [
        _one_step(number, step, within)
        for number, (step, within) in enumerate(zip(steps, inside, strict=True), start=1)
    ]


def _one_step(number: int, step: Span, inside: Sequence[Span]) -> StepProfile:
    def of(row: str) -> list[Span]:
        return [span for span in inside if span.row == row]

    reads = [span for span in inside if span.row.startswith(READ_ROWS)]
    copies = of(GPU_COPY_ROW)
    return StepProfile(
        number=number,
        num_tokens=step.num_tokens,
        read_s=covered_s(reads),
        wait_s=_sum_s(of(GPU_WAIT_ROW) or of(WAIT_ROW)),
        bind_s=_sum_s(of(BIND_ROW)),
        forward_s=_sum_s(of(FORWARD_ROW)),
        copy_s=covered_s(copies),
        compute_s=covered_s(of(GPU_COMPUTE_ROW)),
        propose_s=_sum_s(of(PROPOSE_ROW)),
        total_s=step.end_s - step.begin_s,
        disk_bytes=sum(span.moved_bytes for span in reads),
        link_bytes=sum(span.moved_bytes for span in (copies or of(FEED_ROW))),
    )


def _sum_s(spans: Iterable[Span]) -> float:
    return sum(span.end_s - span.begin_s for span in spans)


def covered_s(spans: Iterable[Span]) -> float:
    """Seconds covered by at least one of the spans."""
    total = 0.0
    end_s = float("-inf")
    for span in sorted(spans, key=lambda span: span.begin_s):
        total += max(0.0, span.end_s - max(span.begin_s, end_s))
        end_s = max(end_s, span.end_s)
    return total


_COLUMNS: tuple[tuple[str, Callable[[StepProfile], float], int], ...] = (
    ("tokens", lambda step: step.num_tokens, 0),
    ("read", lambda step: step.read_s, 3),
    ("wait", lambda step: step.wait_s, 3),
    ("bind", lambda step: step.bind_s, 4),
    ("forward", lambda step: step.forward_s, 3),
    ("copy", lambda step: step.copy_s, 3),
    ("compute", lambda step: step.compute_s, 3),
    ("propose", lambda step: step.propose_s, 3),
    ("wall", lambda step: step.wall_s, 3),
    ("total", lambda step: step.total_s, 3),
    ("GB disk", lambda step: step.disk_bytes / 1e9, 3),
    ("GB link", lambda step: step.link_bytes / 1e9, 3),
)


def format_profile(steps: Sequence[StepProfile], machine: Machine) -> str:
    """A table, a line a step, with the achieved bandwidths and a legend under it.

    Columns that would hold nothing but zeros (copies on a CPU, say) are left out.
    """
    if not steps:
        return "no step was finished"
    columns = [column for column in _COLUMNS if any(column[1](step) for step in steps)]
    rows = [["step", *(title for title, _, _ in columns)]]
    rows += [
        [str(step.number), *(f"{value(step):.{digits}f}" for _, value, digits in columns)]
        for step in steps
    ]
    if len(steps) >= _MEDIAN_STEPS:
        rows.append(
            ["median"]
            + [f"{statistics.median(map(value, steps)):.{digits}f}" for _, value, digits in columns]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    for name, moved, busy_s, limit in (
        ("link", sum(s.link_bytes for s in steps), sum(s.copy_s for s in steps), machine.link_gb_s),
        ("disk", sum(s.disk_bytes for s in steps), sum(s.read_s for s in steps), machine.disk_gb_s),
    ):
        if moved and limit:
            lines.append(_bandwidth(name, moved, busy_s, sum(s.total_s for s in steps), limit))
    return "\n".join([*lines, _legend(rows[0])])


def _legend(titles: Container[str]) -> str:
    """One line: what the columns of these titles mean."""
    told = "; ".join(f"{title} = {what}" for title, what in _MEANINGS.items() if title in titles)
    return f"of each step, in seconds but for GB and the tokens that it gave: {told}"


def _bandwidth(name: str, moved_bytes: int, busy_s: float, all_s: float, limit: float) -> str:
    """One line; `limit` in GB/s."""
    achieved = moved_bytes / 1e9 / all_s
    line = (
        f"{name}: {moved_bytes / 1e9:.3f} GB at {achieved:.2f} GB/s over all steps, "
        f"{achieved / limit:.0%} of the {limit:.2f} GB/s measured"
    )
    return f"{line}; at work {busy_s / all_s:.0%} of the time" if busy_s else line
