"""The profile: its arithmetic on made-up spans, and what a real run leaves in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerpack.cli import main as cli
from layerpack.formats.errors import TargetError
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.machine.machine import Machine
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits
from layerpack.runtime.trace.chrome import chrome_trace, write_chrome_trace
from layerpack.runtime.trace.profile import covered_s, format_profile, profile_steps
from layerpack.runtime.trace.trace import Span, Trace

PackOf = Callable[..., Path]
GPU = Machine(device="made up", vram_free_bytes=1, host_free_bytes=1, link_gb_s=10.0, disk_gb_s=4.0)


def span(row: str, begin_s: float, end_s: float, **fields: Any) -> Span:
    return Span(row=row, name="layer 0", begin_s=begin_s, end_s=end_s, **fields)


TWO_STEPS = [
    span("step", 10, 12, num_tokens=1),
    span("step", 12, 16, num_tokens=5),
    span("layerpack-read-0", 9.5, 10.5, moved_bytes=10**9),  # before the first step: left out
    span("layerpack-read-0", 10.5, 11.5, moved_bytes=10**9),
    span("layerpack-read-1", 11, 12.5, moved_bytes=2 * 10**9),
    span("gpu copy", 10, 10.5, moved_bytes=4 * 10**9),
    span("gpu copy", 12.5, 15, moved_bytes=20 * 10**9),
    span("feed", 10, 11, moved_bytes=3),  # the host's word, not needed beside the GPU's
    span("gpu wait", 12, 12.5),
    span("gpu wait", 13, 13.25),
    span("wait", 12, 12.1),
    span("bind", 12.5, 12.6),
    span("forward", 12.6, 12.8),
    span("forward", 12.9, 13.0),
    span("gpu compute", 13.5, 15.5),
    span("propose", 12, 13),
]


def test_spans_are_summed_up_by_step() -> None:
    first, second = profile_steps(TWO_STEPS)
    assert (first.number, first.num_tokens, first.total_s) == (1, 1, 2)
    assert first.read_s == 2  # 10.5 to 11.5 and 11 to 12.5: together, not added
    assert (first.disk_bytes, first.link_bytes) == (3 * 10**9, 4 * 10**9)
    assert (first.copy_s, first.wait_s, first.compute_s) == (0.5, 0, 0)
    assert (second.num_tokens, second.total_s, second.propose_s, second.wall_s) == (5, 4, 1, 3)
    assert (second.read_s, second.disk_bytes, second.link_bytes) == (0, 0, 20 * 10**9)
    assert second.wait_s == 0.75  # by the GPU's clock, since there is one
    assert second.bind_s == pytest.approx(0.1)
    assert second.forward_s == pytest.approx(0.3)
    assert second.compute_s == 2


def test_without_a_gpu_the_host_says_what_waited_and_moved() -> None:
    spans = [s for s in TWO_STEPS if not s.row.startswith("gpu")]
    first, second = profile_steps(spans)
    assert first.link_bytes == 3
    assert second.wait_s == pytest.approx(0.1)
    assert first.copy_s == second.compute_s == 0


def test_covered_time_counts_overlaps_once() -> None:
    assert covered_s([]) == 0
    assert covered_s([span("r", 0, 4), span("r", 1, 2), span("r", 3, 5), span("r", 6, 7)]) == 6


def test_the_table_has_bandwidths_and_a_legend() -> None:
    title, first, second, link, disk, legend = format_profile(
        profile_steps(TWO_STEPS), GPU
    ).splitlines()
    assert " ".join(title.split()) == (
        "step tokens read wait bind forward copy compute propose wall total GB disk GB link"
    )
    assert " ".join(first.split()) == (
        "1 1 2.000 0.000 0.0000 0.000 0.500 0.000 0.000 2.000 2.000 3.000 4.000"
    )
    assert len(title) == len(first) == len(second)
    assert link == (
        "link: 24.000 GB at 4.00 GB/s over all steps, 40% of the 10.00 GB/s measured; "
        "at work 50% of the time"
    )
    assert disk.startswith("disk: 3.000 GB at 0.50 GB/s over all steps, 12% of the 4.00 GB/s")
    told = [meaning.split(" = ")[0] for meaning in legend.partition(": ")[2].split("; ")]
    assert " ".join(told) == "read wait bind forward copy compute propose wall total"


def test_the_table_leaves_out_what_is_nothing_and_adds_medians() -> None:
    steps = profile_steps(span("step", at, at + 1 + at, num_tokens=1) for at in (0, 10, 30))
    title, *_, median, legend = format_profile(steps, GPU).splitlines()
    assert " ".join(title.split()) == ("step tokens wall total")
    assert " ".join(median.split()) == ("median 1 11.000 11.000")
    assert legend == (
        "of each step, in seconds but for GB and the tokens that it gave: wall = the pass; "
        "total = all of it, until the tokens are known"
    )
    assert format_profile([], GPU) == "no step was finished"


def test_a_trace_is_what_chrome_and_perfetto_open(tmp_path: Path) -> None:
    more = [span(f"layerpack-read-{n}", 11, 12) for n in (10, 9)]
    write_chrome_trace([*TWO_STEPS, *more], tmp_path / "trace.json")
    rows = check_trace(json.loads((tmp_path / "trace.json").read_text()))
    assert [row for row in rows if "read" in row] == [f"layerpack-read-{n}" for n in (0, 1, 9, 10)]
    assert rows[:5] == ["step", "propose", "gpu compute", "gpu wait", "gpu copy"]
    assert check_trace(chrome_trace([])) == []


def check_trace(document: dict[str, Any]) -> list[str]:
    """The rows' names from top to bottom; every event is well-formed, in a row with a name."""
    names: dict[int, str] = {}
    places: dict[int, int] = {}
    for event in document["traceEvents"]:
        assert event["pid"] == 1
        if event["ph"] == "M":
            if event["name"] == "thread_name":
                names[event["tid"]] = event["args"]["name"]
            elif event["name"] == "thread_sort_index":
                places[event["tid"]] = event["args"]["sort_index"]
            continue
        assert event["ph"] == "X" and event["name"]
        assert event["tid"] in names
        assert event["ts"] >= 0 and event["dur"] >= 0
    assert len(set(names.values())) == len(names)
    return [names[row] for row in sorted(names, key=lambda row: places[row])]


def test_a_trace_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="the trace cannot be written"):
        write_chrome_trace([], tmp_path / "nowhere" / "trace.json")


def test_a_run_from_disk_is_profiled(pack_of: PackOf) -> None:
    trace = Trace()
    options = OpenOptions(device="cpu", limits=Limits(host_slices=1, num_slots=2))
    with Model.open(pack_of("llama"), options, trace=trace) as model:
        result = model.generate("hello", GenerateOptions(max_new_tokens=6))
        streamed_bytes, slices = model.plan.streamed_bytes, model.plan.slices
    steps = profile_steps(trace.spans)
    assert [step.num_tokens for step in steps] == [1] * 6
    assert sum(step.total_s for step in steps) <= result.seconds
    for step in steps:
        assert 0 < step.bind_s < step.forward_s < step.total_s
        assert 0 <= step.wait_s < step.total_s
        assert step.propose_s == step.copy_s == step.compute_s == 0
    # The feeder runs ahead by two slots, so a step may begin with copies of the one before.
    copied = [s.moved_bytes for s in trace.spans if s.row == "feed"]
    assert sum(copied) >= 6 * streamed_bytes
    last_begin_s = max(s.begin_s for s in trace.spans if s.row == "step")
    last = [s.name for s in trace.spans if s.row == "forward" and s.begin_s > last_begin_s]
    assert sorted(last) == sorted(part.title for part in slices)


def test_each_pass_of_a_long_prompt_is_a_step(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerpack.runtime.requests.scheduler.PREFILL_TOKENS", 16)
    trace = Trace()
    options = OpenOptions(device="cpu", draft=str(pack_of("llama")))
    with Model.open(pack_of("llama"), options, trace=trace) as model:
        wanted = GenerateOptions(max_new_tokens=10, draft_tokens=4, raw=True)
        result = model.generate("a" * 40, wanted)
    steps = profile_steps(trace.spans)
    given = [step.num_tokens for step in steps]
    assert given[:3] == [0, 0, 1] and sum(given) == 10 and len(given) == result.passes
    assert [step.propose_s > 0 for step in steps] == [False] * 3 + [True] * (len(steps) - 3)
    assert all(step.wall_s > 0 for step in steps)


def test_generate_prints_a_profile_and_writes_a_trace(
    pack_of: PackOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*more: str) -> tuple[object, str]:
        arguments = ["generate", str(pack_of("llama")), "--prompt", "hello", "--device", "cpu"]
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments, "--ram", "1K", "--max-new-tokens", "4", *more])
        return ended.value.code, capsys.readouterr().err

    file = tmp_path / "trace.json"
    code, err = generate("--profile", "--profile-trace", str(file))
    assert code == 0
    _, title, *steps, median, disk, legend = err.splitlines()
    assert " ".join(title.split()) == (
        "step tokens read wait bind forward wall total GB disk GB link"
    )
    assert [line.split()[0] for line in steps] == ["1", "2", "3", "4"]
    assert median.startswith("median") and disk.startswith("disk: ")
    assert "read = " in legend and "copy = " not in legend
    rows = check_trace(json.loads(file.read_text()))
    assert {"step", "forward", "bind", "wait", "feed", "layerpack-read-0"} <= set(rows)
    file.unlink()
    code, err = generate("--profile-trace", str(tmp_path / "nowhere" / "trace.json"))
    assert code == 1 and err.count("\n") == 1 and "the trace cannot be written" in err
