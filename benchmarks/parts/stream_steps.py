"""The steps of stream.py: each measures one thing and notes its figures."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch
from parts.passes import GROWTH_PASSES, measure_growth, summary
from parts.stream_run import Run
from startup import measure_startup

from layerpack.cli.options.sizes import parse_size
from layerpack.formats.units import GIB
from layerpack.runtime.engine.options import DRAFT_TOKENS, GenerateOptions
from layerpack.runtime.network.exact import token_by_token
from layerpack.runtime.plan.plan import Limits, Tier

_DECODED = 24


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
    layers_path = run.pack.manifest.model.layers_path
    with run.opened(run.in_host()) as model:
        for what, checking in (
            ("at once", None),
            ("exactly", functools.partial(token_by_token, model.network, layers_path)),
        ):
            times_s = run.time(model, tokens=tokens, check=checking)
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
        pinned = model.plan.num_buffers * model.plan.buffer_bytes
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
