"""What `layerpack calibrate` does once its options are known; imported late, as it needs torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from layerpack.cli.progress import window_bar
from layerpack.cli.sign_of_life import SignOfLife
from layerpack.formats.pack import Pack
from layerpack.formats.text import printable
from layerpack.formats.units import human_bytes
from layerpack.runtime.machine.host_memory import host_memory
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits
from layerpack.runtime.quality.calibrate import calibrate, making, record_of, work_of
from layerpack.runtime.quality.evaluate import fitting
from layerpack.runtime.quality.windows import read_text, windows_of
from layerpack.runtime.tokenizer import load_tokenizer

INTERRUPTED = 130
_FEW_TOKENS = 20_000  # 8,192 of prose alone made code worse than plain NF4 has it: docs/log.md
_SUMS_SHARE, _WEIGHTS_SHARE = 4, 2
"""Of free memory: a quarter for sums, a half for weights."""


def run(path: Path, options: dict[str, Any], life: SignOfLife) -> int:
    """Make the calibration; the exit code. Raises LayerpackError."""
    begin_s = time.perf_counter()
    pack, target = Pack.open(path), options["calibration"]
    windows = windows_of(
        read_text(options["text"]),
        load_tokenizer(pack.path),
        num_tokens=options["window"],
        most=options["windows"],
        where=str(options["text"]),
    )
    free_bytes, _ = host_memory()
    ram_bytes = options["ram"] if options["ram"] is not None else free_bytes // _WEIGHTS_SHARE
    how = OpenOptions(
        device=options["device"],
        limits=Limits(vram_bytes=options["vram"], ram_bytes=ram_bytes),
    )
    how, at_a_time = fitting(pack, how, windows)
    with making(target, record_of(pack, windows)) as unfinished:
        try:
            with Model.open(pack, how) as model:
                work = work_of(model, unfinished.missing, free_bytes // _SUMS_SHARE)
                work.check_room(target)
                life.over()
                times = "once" if len(work.rounds) == 1 else f"{len(work.rounds)} times"
                click.echo(
                    f"{windows.ids.numel()} tokens go through {pack.manifest.model.architecture} "
                    f"{times}; at most {human_bytes(work.disk_bytes)} to write",
                    err=True,
                )
                if windows.ids.numel() < _FEW_TOKENS:
                    click.echo(
                        f"note: {windows.ids.numel()} tokens are few; what the text does not show "
                        "may come out worse than without (40,000 are good)",
                        err=True,
                    )
                with window_bar("calibrate", len(windows) * len(work.rounds)) as show:
                    calibrate(model, windows, at_a_time, work, unfinished, on_windows=show)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command goes on from here", err=True)
            return INTERRUPTED
        unfinished.finish()
    written_bytes = sum(file.stat().st_size for file in target.iterdir())
    click.echo(
        f"{printable(str(target))}: {pack.manifest.model.num_layers} layers, "
        f"{windows.ids.numel()} tokens, {human_bytes(written_bytes)} "
        f"in {time.perf_counter() - begin_s:.0f} s"
    )
    return 0
