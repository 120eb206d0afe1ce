"""`layerpack bench`: all rows of one run, each told as soon as it is measured.

The limits stand beside the rows: every ratio is taken against the best link of the run. What one
row cannot do (memory, a refusal of the system) ends that row alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from layerpack.formats.errors import LayerpackError, PackError, PromptError
from layerpack.formats.pack import Pack
from layerpack.runtime.bench.machine import describe_machine, let_go
from layerpack.runtime.bench.options import BenchOptions
from layerpack.runtime.bench.report import LeftOut, Report, RowResult
from layerpack.runtime.bench.row import RowRunner
from layerpack.runtime.bench.rows import ROWS, Row
from layerpack.runtime.core.device_errors import device_failed, is_device_error
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.threads import Worker
from layerpack.runtime.machine.devices import capped_vram, pick_device
from layerpack.runtime.plan.needs import context_limit


def run_bench(
    path: Path,
    options: BenchOptions,
    *,
    on_row: Callable[[Row], None] = lambda _: None,
    on_outcome: Callable[[RowResult | LeftOut], None] = lambda _: None,
) -> Report:
    """Measure the rows; minutes. `on_row` is called before each of them that runs.

    `on_outcome` is called with each row's figures as soon as there are any, or why it has none.
    Ctrl-C ends it early: what was measured comes back. Raises PackError, PromptError,
    CapacityError, StreamError. Nothing is left behind: no file, thread or registration.
    """
    pack = Pack.open(path)
    if pack.manifest.compression is not None:
        raise PackError(
            f"{path}: is compressed, which the loaders to compare with cannot read; run "
            "`layerpack unpack` first and time the plain pack"
        )
    _check_context(pack, options)
    device = pick_device(options.device)
    machine = describe_machine(device)  # before a row that may fail for good
    rows: list[RowResult] = []
    left_out: list[LeftOut] = []
    interrupted = False
    patience = Patience()
    worker = Worker("bench", patience)
    runner = RowRunner(pack, device, options, patience)
    try:
        for row in ROWS:
            if options.rows and row.name not in options.rows:
                continue
            if (reason := row.why_not(device.type)) is None:
                on_row(row)
                outcome = worker.call(functools.partial(_measure, row, runner, device))
            else:
                outcome = _left_out(row, reason)
            if isinstance(outcome, RowResult):
                rows.append(outcome)
            else:
                left_out.append(outcome)
            on_outcome(outcome)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        try:
            worker.call(runner.close)
        finally:
            worker.close()
    return Report(
        machine=machine,
        pack=f"{path} (of {pack.manifest.source.id})",
        num_layers=pack.manifest.model.num_layers,
        context_tokens=options.context_tokens,
        link_gb_s=max(runner.link_gb_s, default=None),
        disk_gb_s=max(runner.disk_gb_s, default=None),
        rows=tuple(rows),
        left_out=tuple(left_out),
        interrupted=interrupted,
    )


def _check_context(pack: Pack, options: BenchOptions) -> None:
    limit = context_limit(pack)
    tokens = max(1, options.context_tokens) + options.passes
    if limit is not None and tokens > limit:
        raise PromptError(
            f"--context {options.context_tokens} and --passes {options.passes} make {tokens} "
            f"tokens, the model's context is {limit}; use a smaller --context"
            + (" and fewer --passes" if options.passes >= limit else "")
        )


def _measure(row: Row, runner: RowRunner, device: torch.device) -> RowResult | LeftOut:
    try:
        with capped_vram(device, runner.options.vram_bytes):
            return runner.run(row)
    except (LayerpackError, OSError, RuntimeError) as error:  # out of memory, too
        return _left_out(row, _one_line(error))
    finally:
        let_go(device)


def _left_out(row: Row, reason: str) -> LeftOut:
    return LeftOut(name=row.name, switches=row.way.switches, reason=reason)


def _one_line(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the device ran out of memory: " + str(error).split(". ")[0]
    if is_device_error(error):
        return str(device_failed("in this row", error))
    return " ".join(str(error).split()) or repr(error)
