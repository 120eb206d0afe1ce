"""What `layerpack batch` does once its options are known; imported late, as it needs torch."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from layerpack.cli.options.memory import limits_of
from layerpack.cli.progress import thin_bar
from layerpack.cli.sign_of_life import SignOfLife
from layerpack.formats.errors import PromptError
from layerpack.formats.pack import Pack
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.sequences import context_and_kv
from layerpack.serving.batch import (
    Line,
    Results,
    Tally,
    read_prompts,
    read_requests,
    run_batch,
)

FAILED_SOME, INTERRUPTED = 1, 130
_EACH_TOKENS = 1024  # of prompt and template, beside the answer, unless --context says


def run(
    path: Path,
    requests: Path | None,
    options: dict[str, Any],
    life: SignOfLife,
    *,
    on_open: Callable[[], object],
) -> int:
    """Answer what is missing; the exit code. Raises LayerpackError."""
    lines = _lines_of(requests, options)
    pack = Pack.open(path)
    results = Results(options["output"])
    with contextlib.closing(results):
        missing = [line for line in lines if not results.has(line)]
        if not missing:
            life.over()
            click.echo(f"{options['output']}: all {len(lines)} have their results", err=True)
            return 0
        context, kv_tokens = context_and_kv(
            pack,
            context=options["context"] or options["max_new_tokens"] + _EACH_TOKENS,
            sequences=options["sequences"] or len(missing),
            device=options["device"],
            limits=limits_of(options),
            exactly=options["sequences"] is not None,
        )
        how = OpenOptions(
            device=options["device"],
            limits=limits_of(options),
            context_tokens=context,
            kv_tokens=kv_tokens,
            same_bits=True,
        )
        with Model.open(pack, how) as model:
            on_open()
            life.over()
            if model.rows is None:
                click.echo(f"note: one answer at a time: {model.why_no_rows}", err=True)
            begin_s = time.perf_counter()
            with _shown(model) as show:
                try:
                    tally = run_batch(
                        model,
                        lines,
                        results,
                        name=path.name,
                        default_tokens=options["max_new_tokens"],
                        on_progress=show,
                    )
                except KeyboardInterrupt:
                    click.echo("interrupted; the same command goes on from here", err=True)
                    return INTERRUPTED
            click.echo(_summary(model, tally, time.perf_counter() - begin_s), err=True)
    return FAILED_SOME if tally.failed else 0


def _lines_of(requests: Path | None, options: dict[str, Any]) -> list[Line]:
    if requests is not None:
        return read_requests(requests)
    body: dict[str, Any] = {"temperature": options["temperature"] or 0.0}
    lines = read_prompts(options["prompts"], body)
    if options["system"] is not None:
        if not options["system"].strip():
            raise PromptError("the system message is empty; leave --system out")
        for line in lines:
            if line.body is not None:
                system = {"role": "system", "content": options["system"]}
                line.body["messages"].insert(0, system)
    return lines


@contextmanager
def _shown(model: Model) -> Iterator[Callable[[Tally], None]]:
    """A bar of answers on a terminal, with tokens a second; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda tally: None
        return
    begin_s, bar = time.perf_counter(), None

    def show(tally: Tally) -> None:
        nonlocal bar
        if bar is None:
            bar = thin_bar(
                total=tally.total,
                initial=tally.before,
                unit="answer",
            )
        counts, seconds = model.counts, max(1e-9, time.perf_counter() - begin_s)
        bar.set_postfix_str(
            f"{counts.generated_tokens / seconds:.1f} tokens/s, {counts.running} at a time, "
            f"layer {model.progress.done + 1}/{model.progress.total}",
            refresh=False,
        )
        bar.update(tally.before + tally.answered + tally.failed - bar.n)
        bar.refresh()

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def _summary(model: Model, tally: Tally, seconds: float) -> str:
    """One line: answers, tokens, passes."""
    counts = model.counts
    parts = [f"{tally.answered} answers in {seconds:.1f} s"]
    if tally.before:
        parts.append(f"{tally.before} were there")
    if tally.failed:
        parts.append(f"{tally.failed} failed")
    parts.append(f"{tally.tokens} tokens, {tally.tokens / max(seconds, 1e-9):.1f} a second")
    if counts.passes:
        each = counts.pass_s / counts.passes
        parts.append(f"{counts.passes} passes of {each:.3f} s")
        parts.append(f"{counts.generated_tokens / counts.passes:.1f} tokens a pass")
    if counts.cached_tokens:
        parts.append(f"{counts.cached_tokens} tokens of prompts were known")
    return "[" + "; ".join(parts) + "]"
