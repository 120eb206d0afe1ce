"""The steps of stream.py: each measures one thing and notes its figures."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable

import torch
from parts.passes import GROWTH_PASSES, let_pass, measure_growth, sequence_of, summary
from parts.stream_run import Run
from startup import measure_startup

from layerpack.cli.options.sizes import parse_size
from layerpack.formats.units import GIB
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.tree import ROOT, Tree
from layerpack.runtime.plan.plan import Limits, Tier

_DECODED = 24
_LET_PASS = 4


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


def tree(run: Run) -> None:
    """Passes that check full trees of nodes."""
    with run.opened(run.in_host()) as model:
        for nodes in (64, 256):
            times_s = run.time(model, tokens=1, nodes=nodes - 1)
            run.note(f"a tree of {nodes} rows", summary(times_s))
            if run.one_s:
                run.note(f"{nodes} rows over 1", round(statistics.median(times_s) / run.one_s, 4))


def bits(run: Run) -> None:
    """Eight tokens in a chain, in a tree of 64 and alone, behind one prompt: are the bits equal?"""
    chance = random.Random(0)
    prompt, text = ([chance.randrange(256) for _ in range(n)] for n in (run.context, 8))
    with run.opened(run.in_host()) as model:
        assert model.rows is not None, model.why_no_rows
        tree, place = Tree(), ROOT
        for _ in range(20):
            tree.add(chance.choice([ROOT, *range(len(tree))]), 256 + chance.randrange(1000))
        places = []
        for token in text[1:]:
            place = tree.add(place, token)
            places.append(place)
            while len(tree) < 20 + 6 * len(places):
                tree.add(chance.choice([ROOT, *range(len(tree))]), 256 + chance.randrange(1000))
        with sequence_of(model, run.context + 8, len(tree)) as sequence:
            sequence.extend(prompt)
            found = sequence.extend([*prompt, text[0]], tree)[[0, *(one + 1 for one in places)]]
            sequence.keep(())
            alone = [sequence.extend([*prompt, *text[:end]]) for end in range(2, len(text) + 1)]
    equal = sum(bool(torch.equal(a[0], b)) for a, b in zip(alone, found[1:], strict=True))
    run.note("rows of a tree equal to passes of their own", f"{equal} of {len(alone)}")


def decode(run: Run) -> None:
    """`generate` as users call it: a cache that grows, a tokenizer, a stream of text."""
    options = GenerateOptions(raw=True, max_new_tokens=_DECODED)
    with run.opened(run.in_host()) as model:
        done = model.generate("a b " * (run.context // 4), options)
    pass_s = run.decoded_s = (done.seconds - done.first_pass_s) / max(1, done.passes - 1)
    run.note("generate", {"prompt tokens": done.prompt_tokens, "tokens": len(done.token_ids)})
    limit_s = run.total_bytes / 1e9 / run.link_gb_s
    run.note("generate, seconds per token after the first", round(pass_s, 4))
    run.note("generate over limit", round(pass_s / limit_s, 4))


def drafted(run: Run) -> None:
    """`generate` with a draft of random weights, four of whose tokens are let pass for right."""
    if run.draft is None:
        raise ValueError("needs --draft")
    with run.opened(run.in_host(), draft=run.draft) as model:
        run.note("rows that are free", model.free_rows)
        for nodes in (64, None):
            options = GenerateOptions(raw=True, max_new_tokens=5 * _DECODED, draft_tokens=nodes)
            with let_pass(_LET_PASS):
                done = model.generate("a b " * (run.context // 4), options)
            passes, what = done.passes - 1, f"a draft's {nodes or 'free'} tokens"
            pass_s = (done.seconds - done.first_pass_s) / passes
            run.note(f"{what}, proposed a pass", round(done.proposed_tokens / passes, 1))
            run.note(f"{what}, seconds a pass", round(pass_s, 4))
            tokens_s = pass_s / (len(done.token_ids) - 1) * passes
            run.note(f"{what}, seconds a token", round(tokens_s, 4))
            if run.decoded_s:
                run.note(f"{what}, pass over a plain one", round(pass_s / run.decoded_s, 4))
                run.note(f"{what}, tokens/s over plain", round(run.decoded_s / tokens_s, 3))
        run.note_peak("with a draft")


def memory(run: Run) -> None:
    """A prompt of 4,000 tokens and a tree of 64 rows in 8 GiB: what was planned, what was used."""
    limits = Limits(vram_bytes=parse_size(run.vram), host_slices=len(run.slices))
    with run.opened(limits, context=4096, nodes=63) as model:
        plan, steady = model.plan, torch.cuda.memory_allocated()
        kept = plan.bytes_in(Tier.VRAM) + plan.num_slots * plan.slot_bytes
        peaks = {}
        with sequence_of(model, 3996, 63, spare=0) as sequence:
            for what, tokens in {"prefill": 2048, "4,000 tokens": 4000}.items():
                sequence.extend([number % 256 for number in range(tokens - 8)])
                peaks[what] = torch.cuda.max_memory_allocated()
            for _ in range(3):
                tree = Tree()
                while len(tree) < 63:
                    tree.add(random.randrange(-1, len(tree)), random.randrange(256))
                ids = [number % 256 for number in range(3993)]
                sequence.extend(ids, tree).argmax(-1).tolist()
            peaks["tree"] = torch.cuda.max_memory_allocated()
    run.note(
        "memory planned, MB",
        {name: round(value / 1e6) for name, value in dataclasses.asdict(plan.needs).items()},
    )
    run.note("memory kept, MB: planned, seen", [round(kept / 1e6), round(steady / 1e6)])
    run.note("memory peaks, MB", {name: round(value / 1e6) for name, value in peaks.items()})
    planned = kept + plan.needs.total_bytes
    run.note("memory, peak over plan", round(max(peaks.values()) / planned, 4))


def answers(run: Run) -> None:
    """1, 16 and 96 answers at a time, each of 64 tokens behind a prompt of 64 of its own."""
    each, first = 128, None
    limits = Limits(vram_bytes=parse_size(run.vram), host_slices=len(run.slices))
    with run.opened(limits, context=each, kv_tokens=96 * each) as model:
        how = GenerateOptions(max_new_tokens=64, raw=True, look_up=False)
        for count in (1, 16, 96):
            begin_s, passes = time.perf_counter(), model.counts.passes
            asked = [model.submit(f"{number:03} " * 16, how) for number in range(count)]
            tokens = sum(len(answer.wait().token_ids) for answer in asked)
            seconds = time.perf_counter() - begin_s
            passes = model.counts.passes - passes
            first = first or tokens / seconds
            run.note(
                f"{count} answers",
                {
                    "tokens/s": round(tokens / seconds, 2),
                    "over 1": round(tokens / seconds / first, 2),
                    "passes": passes,
                    "seconds a pass": round(seconds / passes, 4),
                },
            )
        run.note_peak("96 answers")


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
    "tree": tree,
    "bits": bits,
    "decode": decode,
    "drafted": drafted,
    "memory": memory,
    "answers": answers,
    "growth": growth,
    "filled": filled,
    "4gib": four_gib,
    "half": half,
    "disk": disk,
    "first": first,
}
