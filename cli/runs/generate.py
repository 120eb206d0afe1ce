"""What `layerpack generate` does once its options are known; imported late, as it needs torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from layerpack.cli.options.memory import limits_of
from layerpack.cli.options.sampling import sampling_of
from layerpack.cli.sign_of_life import SignOfLife
from layerpack.formats.errors import PromptError
from layerpack.formats.pack import Pack
from layerpack.formats.units import human_bytes
from layerpack.formats.verify import require_intact
from layerpack.runtime.engine.options import MOST_DRAFT_TOKENS, GenerateOptions
from layerpack.runtime.generate import Generation
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.text import plan_text
from layerpack.runtime.room import tokens_needed
from layerpack.runtime.trace.chrome import write_chrome_trace
from layerpack.runtime.trace.profile import format_profile, profile_steps
from layerpack.runtime.trace.trace import NO_TRACE, Trace

INTERRUPTED = 130


def run(
    path: Path,
    prompt: str,
    options: dict[str, Any],
    life: SignOfLife,
    *,
    on_open: Callable[[], object],
) -> int:
    """Generate and print; the exit code. `on_open()` when all is set up. Raises LayerpackError."""
    if not prompt.strip():
        raise PromptError("the prompt is empty; give some text with --prompt or on standard input")
    if options["verify"]:
        require_intact(path)
    wanted = GenerateOptions(
        max_new_tokens=options["max_new_tokens"],
        **sampling_of(options),
        raw=options["raw"],
        system=options["system"],
        template_arguments=options["template_arguments"],
        draft_tokens=options["draft_tokens"],
        prompt_lookup_tokens=options["prompt_lookup"],
        look_up=not options["no_prompt_lookup"],
    )
    pack = Pack.open(path)
    drafting = options["draft"] is not None
    how = OpenOptions(
        device=options["device"],
        limits=limits_of(options),
        context_tokens=options["context"] or tokens_needed(pack, prompt, wanted),
        draft=options["draft"],
        proposed_tokens=(options["draft_tokens"] or MOST_DRAFT_TOKENS if drafting else 0)
        + wanted.lookup_tokens(rows_are_free=True),
        same_bits=options["same_bits"],
    )
    trace_file = Path(options["profile_trace"]) if options["profile_trace"] else None
    if trace_file is not None:
        write_chrome_trace([], trace_file)  # if that cannot be, better now than after the work
    trace = Trace() if options["profile"] or trace_file is not None else NO_TRACE
    started_s = time.perf_counter()
    with Model.open(pack, how, trace=trace) as model:
        on_open()
        life.over()
        if options["verbose"]:
            click.echo(plan_text(model.plan, model.machine), err=True)
            click.echo(describe_rows(model), err=True)
            click.echo(describe_setup(model, started_s - options["began_s"]), err=True)
        elif model.why_no_rows and options["prompt_lookup"]:
            click.echo(f"note: {describe_rows(model)}", err=True)
        first = f"the first pass of {human_bytes(model.plan.streamed_bytes)}"
        life.say(f"{first} …")

        def print_text(piece: str) -> None:
            life.over()
            _print_piece(piece)

        result = model.generate(
            prompt,
            wanted,
            on_text=print_text,
            on_wait=lambda progress: life.bar(first, progress.done, progress.total, "layers"),
        )
        life.over()
        click.echo()
        click.echo(summary(model, result), err=True)
        if options["profile"]:
            steps = profile_steps(trace.spans)
            click.echo(format_profile(steps, model.machine), err=True)
    if trace_file is not None:
        write_chrome_trace(trace.spans, trace_file)
    return INTERRUPTED if result.finish == "interrupted" else 0


def describe_rows(model: Model) -> str:
    """One line: how many tokens of a pass are computed alike."""
    if model.rows is None or model.rows.product is None:
        return f"one token a pass, none can be tried: {model.why_no_rows}"
    return f"equal bits for any number of tokens in a pass: products {model.rows.product.name}"


def describe_setup(model: Model, before_s: float) -> str:
    """One line: where the time before the first pass went."""
    setup = model.setup
    draft = f"draft {setup.draft_s:.2f}, " if model.draft is not None else ""
    return (
        f"[set-up: {before_s:.2f} s imports; {setup.total_s:.2f} s opening: {draft}"
        f"plan {setup.plan_s:.2f}, more imports, tokenizer and network {setup.network_s:.2f}, "
        f"waiting for weights {setup.wait_for_weights_s:.2f}, binding {setup.attach_s:.2f}]"
    )


def _print_piece(piece: str) -> None:
    click.echo(piece, nl=False)


def summary(model: Model, result: Generation) -> str:
    """One line: tokens, seconds per pass, what was proposed, bytes streamed, peak VRAM."""
    each = f", {result.seconds / len(result.token_ids):.3f} s a token" if result.token_ids else ""
    parts = [
        f"{len(result.token_ids)} tokens in {result.seconds:.1f} s{each}",
        f"{result.passes} passes of {result.pass_s:.3f} s",
    ]
    if result.proposed_tokens:
        parts.append(
            f"{result.tokens_per_pass:.1f} tokens a pass, {result.accepted_tokens} of "
            f"{result.proposed_tokens} proposed ones accepted "
            f"({result.accepted_tokens / result.proposed_tokens:.0%})"
        )
    parts += [
        f"{human_bytes(model.plan.streamed_bytes)} streamed a pass, "
        f"{human_bytes(model.plan.streamed_bytes * result.passes)} in all",
    ]
    if result.seed is not None:
        parts.append(f"seed {result.seed}")
    if result.peak_vram_bytes:
        parts.append(f"peak VRAM {human_bytes(result.peak_vram_bytes)}")
    if result.finish == "interrupted":
        parts.append("interrupted")
    return "[" + "; ".join(parts) + "]"
