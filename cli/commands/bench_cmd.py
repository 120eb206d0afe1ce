"""`layerpack bench OUT`: ways of streaming a pack, timed side by side on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from layerpack.cli.options.memory import device_option, ram_option, vram_option
from layerpack.cli.options.numbers import POSITIVE

INTERRUPTED = 130


@click.command()
@click.argument("pack", metavar="OUT", type=click.Path(path_type=Path))
@device_option
@click.option(
    "--context",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="Tokens in the KV cache before the timed passes.",
)
@click.option(
    "--passes",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Timed passes of each row, at most.",
)
@click.option("--rows", metavar="A,B,…", help="Only these rows, by the names in the table.")
@vram_option
@ram_option
@click.option(
    "--layers",
    type=click.IntRange(1),
    metavar="N",
    help="Time the slow methods with the first N layers, scaled up (default: about 4 GB of them).",
)
@click.option(
    "--row-seconds",
    type=POSITIVE,
    default=30.0,
    show_default=True,
    help="Begin no further pass of a row after so long.",
)
@click.option(
    "--scratch",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Directory for the 16-bit layers while it runs (default: beside OUT).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw the rows' seconds, too (needs matplotlib).",
)
def bench(pack: Path, as_json: bool, plot: Path | None, **options: Any) -> None:
    """Time ways of streaming the pack OUT on this machine, and say how far from its limit each is.

    Layer by layer as most programs do it (16 bit or NF4, synchronous or prefetched, pageable or
    pinned), and as layerpack does it. A few layers are decoded to 16 bits for a while, beside OUT
    or in --scratch; the last row drops OUT from the page cache. Takes a few minutes; each row is
    told on standard error as soon as it is measured.
    """
    # late, as they are slow to import
    from layerpack.runtime.bench.options import BenchOptions
    from layerpack.runtime.bench.report import LeftOut, RowResult, plotting
    from layerpack.runtime.bench.rows import ROWS, Row
    from layerpack.runtime.bench.run import run_bench

    names = [row.name for row in ROWS]
    wanted = tuple(name for name in (options["rows"] or "").split(",") if name)
    if unknown := [name for name in wanted if name not in names]:
        raise click.UsageError(f"--rows: no row {', '.join(unknown)}; there are {', '.join(names)}")
    if plot is not None:
        plotting()  # found to be missing now rather than in a few minutes
        if not plot.absolute().parent.is_dir():
            raise click.UsageError(f"--plot {plot}: no such directory")

    def say(row: Row) -> None:
        click.echo(f"[{row.name}: {row.way.switches}]", err=True)

    def say_outcome(outcome: RowResult | LeftOut) -> None:
        if isinstance(outcome, LeftOut):
            text = f"left out: {outcome.reason}"
        else:
            text = f"{outcome.median_s:.3f} s a pass, median of {outcome.passes}"
            if outcome.timed_layers is not None:
                text += ", scaled up from a few layers"
        click.echo(f"[{outcome.name}: {text}]", err=True)

    report = run_bench(
        pack,
        BenchOptions(
            device=options["device"],
            context_tokens=options["context"],
            passes=options["passes"],
            rows=wanted,
            vram_bytes=options["vram"],
            ram_bytes=options["ram"],
            num_layers=options["layers"],
            row_s=options["row_seconds"],
            scratch=options["scratch"],
        ),
        on_row=say,
        on_outcome=say_outcome,
    )
    click.echo(json.dumps(report.to_json(), indent=1) if as_json else report.table())
    if plot is not None:
        report.plot(plot)
    if report.interrupted:
        raise SystemExit(INTERRUPTED)
