"""A trace summed up per step: what waited for what, and how close each link came to its limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerpack.runtime.machine import Machine
from layerpack.runtime.trace import Span

COPY_ROW, COMPUTE_ROW, READ_ROW = "gpu copy", "gpu compute", "layerpack-read"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """One pass. All times in seconds; sums over spans, except `total_s`, the wall clock.

    `read_s` is the time during which at least one reader thread was reading; `wait_s` the
    forward pass waiting for a slice to be on its way; `forward_s` the host issuing layers.
    `copy_s` and `compute_s` are the GPU's two streams at work (0 on a CPU).
    """

    number: int
    read_s: float
    wait_s: float
    bind_s: float
    forward_s: float
    copy_s: float
    compute_s: float
    total_s: float
    disk_bytes: int
    link_bytes: int


def profile_steps(spans: Iterable[Span]) -> list[StepProfile]:
    """One StepProfile for each `step` span. A span belongs to the step in which it began."""
    spans = list(spans)
    steps = sorted((span for span in spans if span.row == "step"), key=lambda span: span.begin_s)
    return [
        _one_step(number, step, [s for s in spans if step.begin_s <= s.begin_s < step.end_s])
        for number, step in enumerate(steps, start=1)
    ]


def _one_step(number: int, step: Span, inside: Sequence[Span]) -> StepProfile:
    def of(row: str) -> list[Span]:
        return [span for span in inside if span.row == row]

    reads = [span for span in inside if span.row.startswith(READ_ROW)]
    copies = of(COPY_ROW)
    return StepProfile(
        number=number,
        read_s=covered_s(reads),
        wait_s=_sum_s(of("wait")),
        bind_s=_sum_s(of("bind")),
        forward_s=_sum_s(of("forward")),
        copy_s=covered_s(copies),
        compute_s=covered_s(of(COMPUTE_ROW)),
        total_s=step.end_s - step.begin_s,
        disk_bytes=sum(span.moved_bytes for span in reads),
        link_bytes=sum(span.moved_bytes for span in (copies or of("feed"))),
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


def format_profile(steps: Sequence[StepProfile], machine: Machine) -> str:
    """A table, one line a step, and the achieved bandwidths under it."""
    lines = [
        "  step     read     wait     bind  forward     copy  compute    total    GB disk  GB link"
    ]
    lines += [
        f"{s.number:6d}{s.read_s:9.3f}{s.wait_s:9.3f}{s.bind_s:9.4f}{s.forward_s:9.3f}"
        f"{s.copy_s:9.3f}{s.compute_s:9.3f}{s.total_s:9.3f}{s.disk_bytes / 1e9:11.2f}"
        f"{s.link_bytes / 1e9:9.2f}"
        for s in steps
    ]
    for name, moved, limit in (
        ("link", sum(s.link_bytes for s in steps), machine.link_gb_s),
        ("disk", sum(s.disk_bytes for s in steps), machine.disk_gb_s),
    ):
        seconds = sum(s.total_s for s in steps)
        if moved and limit and seconds:
            achieved = moved / 1e9 / seconds
            lines.append(
                f"{name}: {achieved:.2f} GB/s over all steps, {achieved / limit:.0%} of the "
                f"{limit:.2f} GB/s measured"
            )
    return "\n".join(lines)
