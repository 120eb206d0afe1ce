"""How close a pass comes to the links' limits: every tier, on the machine at hand, in one run.

    python benchmarks/make_pack.py qwen2.5-72b /data/random-72b
    python benchmarks/stream.py /data/random-72b --vram 8GiB --json result.json

Each ratio's limit is measured in the same run: the link by copies alone from registered mappings,
the disk by whole passes of reads alone in the best of six ways, two before the disk tier and two
after, as disks drift: their median. Passes are transformers' whole forward (attention over a cache
of --context tokens, norms, lm_head). Medians, with the least and the most beside them. About 10
minutes for 38.7 GB a pass at 50 GB/s link and 1.9 GB/s disk; a step that fails says so under its
name, and the others go on.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from disk_alone import Way, probe_ways, read_pass
from passes import (
    DEVICE,
    GROWTH_PASSES,
    describe_machine,
    measure_growth,
    measure_link_limit,
    summary,
    time_passes,
)
from startup import measure_startup

from layerpack.cli.sizes import parse_size
from layerpack.formats.pack import Pack
from layerpack.formats.units import GIB
from layerpack.runtime.draft import DRAFT_TOKENS
from layerpack.runtime.exact import token_by_token
from layerpack.runtime.generate import GenerateOptions
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan import Limits, Tier
from layerpack.runtime.slices import pass_slices

_DECODED = 24


class Run:
    """The figures so far, and what several steps need. `note` prints and keeps a figure."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path: Path = arguments.pack
        self.pack = Pack.open(self.path)
        self.slices = pass_slices(self.pack)
        self.total_bytes = sum(part.length_bytes for part in self.slices)
        self.context: int = arguments.context
        self.passes: int = arguments.passes
        self.probe_s: float = arguments.disk_seconds
        self.vram: str = arguments.vram
        self.result: dict[str, Any] = {
            "machine": describe_machine(),
            "pack": self.pack.manifest.source.id,
            "bytes a pass": self.total_bytes,
        }
        self.begin_s = time.perf_counter()
        self.one_s: float | None = None
        self.disk_gb_s: list[float] = []

    def note(self, name: str, value: Any) -> None:
        """Print and keep one figure."""
        self.result[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        print(f"[{time.perf_counter() - self.begin_s:6.1f} s] {text}", flush=True)

    @functools.cached_property
    def link_gb_s(self) -> float:
        """GB/s of copies alone over the whole pass; measured when first asked for."""
        gb_s, register_s = measure_link_limit(self.slices)
        self.note("link GB/s", round(gb_s, 2))
        self.note("map and register s", round(register_s, 2))
        return gb_s

    @functools.cached_property
    def way(self) -> Way:
        """The best way to read; probed when first asked for."""
        ways = probe_ways(self.slices, seconds=self.probe_s)
        self.note("disk probes GB/s", {way.title: round(way.gb_s, 3) for way in ways})
        return ways[0]

    def read_disk_alone(self) -> None:
        """One more whole pass read alone."""
        self.disk_gb_s.append(read_pass(self.slices, self.way))
        self.note("disk alone GB/s", [round(gb_s, 3) for gb_s in self.disk_gb_s])

    @contextmanager
    def opened(self, limits: Limits) -> Iterator[Model]:
        """A model under the cap of the run, with peak memory counted from here."""
        gc.collect()
        cap_vram(self.vram)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        options = OpenOptions(device="cuda", limits=limits, context_tokens=self.context + 300)
        with Model.open(self.path, options) as model:
            yield model

    def in_host(self, count: int | None = None) -> Limits:
        """No layer in VRAM, and so many (all) in host memory."""
        return Limits(vram_slices=0, host_slices=len(self.slices) if count is None else count)

    def time(
        self,
        model: Model,
        *,
        tokens: int = 1,
        warm_up: int = 1,
        within: AbstractContextManager[None] = nullcontext(),
    ) -> list[float]:
        """See `time_passes`."""
        return time_passes(
            model,
            context=self.context if tokens < 2048 else 0,
            tokens=tokens,
            passes=self.passes,
            warm_up=warm_up,
            within=within,
        )

    def note_peak(self, what: str) -> None:
        """Peak VRAM since the model was opened."""
        self.note(f"peak VRAM GiB, {what}", round(torch.cuda.max_memory_allocated() / GIB, 3))


def host(run: Run) -> None:
    """Everything in host memory, one token a pass."""
    with run.opened(run.in_host()) as model:
        times_s = run.time(model)
        run.note_peak("1 token")
    run.one_s = statistics.median(times_s)
    run.note("host tier, 1 token", summary(times_s))
    limit_s = run.total_bytes / 1e9 / run.link_gb_s
    run.note("host tier over limit", round(run.one_s / limit_s, 4))


def many(run: Run) -> None:
    """The same with 256 tokens in a pass, and a prefill of 2,048."""
    for tokens, what in ((256, "256 tokens"), (2048, "prefill 2048")):
        with run.opened(run.in_host()) as model:
            times_s = run.time(model, tokens=tokens)
            run.note_peak(what)
        run.note(f"host tier, {what}", summary(times_s))
        if run.one_s:
            run.note(f"{what} over 1", round(statistics.median(times_s) / run.one_s, 4))


def exact(run: Run) -> None:
    """A pass that checks 16 proposed tokens: all at once, and with plain decoding's arithmetic."""
    tokens = 1 + DRAFT_TOKENS
    with run.opened(run.in_host()) as model:
        for what, checking in (
            ("at once", nullcontext()),
            ("exactly", token_by_token(model.network, run.pack.manifest.model.layers_path)),
        ):
            times_s = run.time(model, tokens=tokens, within=checking)
            run.note(f"{tokens} tokens checked {what}", summary(times_s))


def decode(run: Run) -> None:
    """`generate` as users call it: a cache that grows, a tokenizer, a stream of text."""
    options = GenerateOptions(raw=True, max_new_tokens=_DECODED)
    with run.opened(run.in_host()) as model:
        done = model.generate("a b " * (run.context // 4), options)
    pass_s = (done.seconds - done.first_pass_s) / max(1, done.passes - 1)
    run.note("generate", {"prompt tokens": done.prompt_tokens, "tokens": len(done.token_ids)})
    limit_s = run.total_bytes / 1e9 / run.link_gb_s
    run.note("generate, seconds per token after the first", round(pass_s, 4))
    run.note("generate over limit", round(pass_s / limit_s, 4))


def growth(run: Run) -> None:
    """What grew over a hundred passes."""
    with run.opened(run.in_host()) as model:
        grown = measure_growth(model, context=run.context)
    run.note(f"growth over {GROWTH_PASSES} passes", grown)


def filled(run: Run) -> None:
    """As many layers in VRAM as the cap allows."""
    limits = Limits(vram_bytes=parse_size(run.vram), host_slices=len(run.slices))
    with run.opened(limits) as model:
        times_s = run.time(model)
        resident = model.plan.bytes_in(Tier.VRAM) / run.total_bytes
        run.note_peak("VRAM filled")
    run.note("VRAM filled, 1 token", summary(times_s))
    run.note("resident share", round(resident, 4))
    if run.one_s and resident:
        gain = 1 - statistics.median(times_s) / run.one_s
        run.note("gain over resident share", round(gain / resident, 4))


def four_gib(run: Run) -> None:
    """`--vram 4GiB`."""
    with run.opened(Limits(vram_bytes=4 * GIB, host_slices=len(run.slices))) as model:
        run.note("--vram 4GiB, 1 token", summary(run.time(model)))
        run.note_peak("--vram 4GiB")


def half(run: Run) -> None:
    """Half the layers in host memory, half on disk; its prefill warms up."""
    if not run.disk_gb_s:
        run.read_disk_alone()
    with run.opened(run.in_host(len(run.slices) // 2)) as model:
        times_s = run.time(model, warm_up=0)
        disk_bytes = model.plan.bytes_in(Tier.DISK)
    run.note("half on disk, 1 token", summary(times_s))
    disk_s = disk_bytes / 1e9 / statistics.median(run.disk_gb_s)
    limit_s = max(disk_s, run.total_bytes / 1e9 / run.link_gb_s)
    run.note("half on disk over limit", round(statistics.median(times_s) / limit_s, 4))


def disk(run: Run) -> None:
    """Every layer on disk; its prefill warms up. The disk alone twice before and twice after."""
    for _ in range(2 - len(run.disk_gb_s)):
        run.read_disk_alone()
    with run.opened(run.in_host(0)) as model:
        times_s = run.time(model, warm_up=0)
        pinned = model.plan.num_pieces * model.plan.piece_bytes
    run.note("disk tier, 1 token", summary(times_s))
    run.note("pinned GiB in disk tier", round(pinned / GIB, 3))
    for _ in range(2):
        run.read_disk_alone()
    limit_s = run.total_bytes / 1e9 / statistics.median(run.disk_gb_s)
    run.note("disk tier over limit", round(statistics.median(times_s) / limit_s, 4))


def first(run: Run) -> None:
    """Fresh processes: to the first token, and importing alone."""
    torch.cuda.empty_cache()
    for title, found in measure_startup(run.path, vram=run.vram, runs=3).items():
        run.note(f"start-up, {title}", found)


def link(run: Run) -> None:
    """The link's limit."""
    assert run.link_gb_s


STEPS: dict[str, Callable[[Run], None]] = {
    "link": link,
    "host": host,
    "many": many,
    "exact": exact,
    "decode": decode,
    "growth": growth,
    "filled": filled,
    "4gib": four_gib,
    "half": half,
    "disk": disk,
    "first": first,
}


def cap_vram(vram: str) -> None:
    """Bound what torch may allocate in this process; opening with a lower bound lowers it."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, parse_size(vram) / total), DEVICE)


def run_steps(run: Run, names: list[str], *, on_step: Callable[[], None]) -> None:
    """Each step in turn; an error becomes the step's figure. `on_step` is called after each."""
    for name in names:
        run.say(name)
        begin_s = time.perf_counter()
        try:
            STEPS[name](run)
        except Exception as error:  # whatever it is, the other figures are wanted
            run.note(f"error in {name}", f"{type(error).__name__}: {' '.join(str(error).split())}")
        run.result.setdefault("seconds by step", {})[name] = round(time.perf_counter() - begin_s, 1)
        gc.collect()
        torch.cuda.empty_cache()
        on_step()
    run.say("end")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--vram", default="8GiB", help="cap for the whole process")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--disk-seconds", type=float, default=1.0, help="of each of six probes")
    parser.add_argument("--only", default="", help=f"steps to take, of {','.join(STEPS)}")
    parser.add_argument("--skip", default="", help="steps to leave out")
    parser.add_argument("--json", type=Path, help="written after each step")
    arguments = parser.parse_args()
    only, skip = (set(filter(None, text.split(","))) for text in (arguments.only, arguments.skip))
    if unknown := (only | skip) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    run = Run(arguments)
    cap_vram(run.vram)

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(run.result, indent=1))

    run_steps(
        run, [name for name in STEPS if name in (only or STEPS) and name not in skip], on_step=save
    )
    print(json.dumps(run.result))


if __name__ == "__main__":
    main()
