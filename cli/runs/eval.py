"""What `layerpack eval` does once its options are known; imported late, as it needs torch."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from layerpack.cli.progress import byte_bar, window_bar
from layerpack.cli.runs.scratch import scratch_beside
from layerpack.cli.sign_of_life import SignOfLife
from layerpack.convert.api import convert
from layerpack.convert.options import ConvertOptions
from layerpack.convert.output.remaining import Remaining
from layerpack.formats.errors import TargetError
from layerpack.formats.manifest.facts import MANIFEST_NAME
from layerpack.formats.pack import Pack
from layerpack.formats.text import printable
from layerpack.formats.units import human_bytes
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits
from layerpack.runtime.quality.evaluate import (
    Outcome,
    check_vocabulary,
    evaluate,
    fitting,
    keep_logits,
    logits_shape,
    num_vocabulary,
)
from layerpack.runtime.quality.figures import Figure
from layerpack.runtime.quality.logits_file import LogitsFile
from layerpack.runtime.quality.windows import Windows, read_text, windows_of
from layerpack.runtime.tokenizer import load_tokenizer

INTERRUPTED = 130
_SIXTEEN_BITS_SUFFIX = ".16bit"
"""After the name of the logits' file: the reference's weights, until it is done."""


def run(path: Path, options: dict[str, Any], life: SignOfLife) -> int:
    """Print the figures; the exit code. Raises LayerpackError."""
    pack = Pack.open(path)
    text = options["text"]
    windows = windows_of(
        read_text(text),
        load_tokenizer(pack.path),
        num_tokens=options["window"],
        most=options["windows"],
        where=str(text or "the text that comes with layerpack"),
    )
    how = OpenOptions(
        device=options["device"],
        limits=Limits(vram_bytes=options["vram"], ram_bytes=options["ram"]),
    )
    with contextlib.ExitStack() as stack:
        reference = None
        if options["reference"] is not None or options["logits"] is not None:
            file = _reference(stack, pack, windows, how, options, life)
            if file is None:
                return INTERRUPTED
            reference = stack.enter_context(LogitsFile.open(file))
            _check_name(reference, file, options["reference"])
            reference.check(windows)
        begin_s = time.perf_counter()
        how, at_a_time = fitting(pack, how, windows)
        with Model.open(pack, how) as model:
            life.over()
            with window_bar("windows", len(windows)) as show:
                outcome = evaluate(model, windows, at_a_time, reference=reference, on_windows=show)
        name = None if reference is None else reference.reference
        seconds = time.perf_counter() - begin_s
    figures = outcome.scores.figures()
    document = _document(path, windows, outcome, name, seconds)
    if options["as_json"]:
        fields = {key: _fields(figure) for key, figure in figures.items()}
        click.echo(json.dumps(document | fields, indent=1))
    else:
        for line in _lines(document, figures):
            click.echo(line)
    if outcome.interrupted:
        click.echo("interrupted: the figures are of the windows so far", err=True)
        return INTERRUPTED
    return 0


def _reference(
    stack: contextlib.ExitStack,
    pack: Pack,
    windows: Windows,
    how: OpenOptions,
    options: dict[str, Any],
    life: SignOfLife,
) -> Path | None:
    """The file of the reference's logits; None if making it was interrupted."""
    source, file = options["reference"], options["logits"]
    if file is not None and file.exists():
        return Path(file)
    if source is None:
        raise TargetError(f"{file}: not there; name whose logits to put there with --reference")
    if file is None:
        file = stack.enter_context(scratch_beside(pack.path)) / "logits"
    name = printable(source)
    needed = logits_shape(pack, windows, source).logits_bytes
    kept = f"kept in {file}" if options["logits"] else "for as long as this runs (keep: --logits)"
    life.over()
    click.echo(f"logits of {name}: {human_bytes(needed)}, {kept}", err=True)
    try:
        with _as_pack(source, file, options["device"]) as reference:
            life.say(f"opening {name} …")
            check_vocabulary(pack, num_vocabulary(reference))
            opened, at_a_time = fitting(reference, how, windows)
            with Model.open(reference, opened) as model:
                life.over()
                with window_bar(f"logits of {name}", len(windows)) as show:
                    keep_logits(model, windows, at_a_time, file, name=source, on_windows=show)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from here" if options["logits"] else ""
        click.echo(f"interrupted{goes_on}", err=True)
        return None
    return Path(file)


def _check_name(kept: LogitsFile, file: Path, source: str | None) -> None:
    if source is not None and kept.reference != source:
        raise TargetError(
            f"{file}: holds the logits of {printable(kept.reference)}; give another file, or "
            "leave --reference out"
        )


@contextmanager
def _as_pack(source: str, file: Path, device: str) -> Iterator[Pack]:
    """The reference as a pack: itself if it is one, else its weights in 16 bits for a while."""
    if (Path(source) / MANIFEST_NAME).exists():
        yield Pack.open(source)
        return
    sixteen = file.with_name(file.name + _SIXTEEN_BITS_SUFFIX)
    # What a break left is whole, or is gone on with; unless it is something else.
    if not sixteen.exists() or not _is_in_16_bits(sixteen, source):
        options = ConvertOptions(nf4=False, device=device, force=True)
        with byte_bar(f"{printable(source)} in 16 bits") as progress:
            convert(source, sixteen, options, progress, _announce)
    yield Pack.open(sixteen)
    shutil.rmtree(sixteen)


def _is_in_16_bits(pack: Path, source: str) -> bool:
    manifest = Pack.open(pack).manifest
    return manifest.source.id == source and manifest.quantization is None


def _announce(work: Remaining) -> None:
    click.echo(
        f"its weights in 16 bits, for as long as this runs: {human_bytes(work.pack_bytes)} "
        f"({human_bytes(work.free_bytes)} free)",
        err=True,
    )


def _document(
    path: Path, windows: Windows, outcome: Outcome, reference: str | None, seconds: float
) -> dict[str, Any]:
    return {
        "pack": str(path),
        "reference": reference,
        "window_tokens": windows.num_tokens,
        "windows": outcome.num_windows,
        "scored_tokens": outcome.scores.num_tokens,
        "passes": outcome.passes,
        "seconds": round(seconds, 3),
        "interrupted": outcome.interrupted,
    }


def _fields(figure: Figure) -> dict[str, float | None]:
    """JSON knows no NaN."""
    values = {"value": figure.value, "standard_error": figure.standard_error}
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


_TITLES = {
    "perplexity": "perplexity",
    "reference_perplexity": "  of the reference",
    "kl_mean": "KL divergence, mean",
    "kl_median": "  median",
    "kl_99th_percentile": "  99th percentile",
    "same_first_choice": "same first choice",
}


def _lines(document: dict[str, Any], figures: Mapping[str, Figure]) -> Iterator[str]:
    yield printable(
        f"{document['pack']}: {document['windows']} windows of {document['window_tokens']} "
        f"tokens, {document['scored_tokens']} scored, in {document['seconds']:.1f} s"
    )
    if document["reference"] is not None:
        yield printable(f"reference: {document['reference']}")
    for name, figure in figures.items():
        title, scale, unit = _TITLES[name], 1, ""
        if name == "same_first_choice":
            scale, unit = 100, " %"
        digits = 2 if unit else 4
        value, error = (f"{scale * n:.{digits}f}" for n in (figure.value, figure.standard_error))
        yield f"{title:20} {value:>10}{unit}  ± {error}{unit}"
