"""A model judged by a text: passes of as many windows as a prefill pass has tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from layerpack.formats.errors import CapacityError, PackError
from layerpack.formats.pack import Pack
from layerpack.libraries.dtypes import TORCH_DTYPES
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import head_weight
from layerpack.runtime.machine.devices import pick_device
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.needs import PREFILL_TOKENS, context_limit
from layerpack.runtime.planning import measured, plan_for
from layerpack.runtime.quality.logits_file import LogitsFile, LogitsShape, writing
from layerpack.runtime.quality.scores import ROWS_AT_A_TIME, Scores
from layerpack.runtime.quality.windows import Windows

_LOGITS_COPIES, _FLOAT_COPIES = 2, 6
"""Of the logits in 16 bits, as lm_head's parts are put together; of a few rows in float32."""

OnWindows = Callable[[int], object]


def fitting(pack: Pack, options: OpenOptions, windows: Windows) -> tuple[OpenOptions, int]:
    """How to open the pack for passes of several windows, and how many of them.

    As many as a prefill pass has tokens, fewer where memory is too small for their logits. Raises
    CapacityError if it is for one, or if a window is longer than the model takes.
    """
    limit = context_limit(pack)
    if limit is not None and windows.num_tokens > limit:
        raise CapacityError(
            f"windows of {windows.num_tokens} tokens: the model of {pack.path} takes {limit}; "
            "give smaller ones with --window"
        )
    device = pick_device(options.device)
    machine, vocabulary = measured(pack, device, options, Patience()), num_vocabulary(pack)
    count = max(1, min(PREFILL_TOKENS // windows.num_tokens, len(windows)))
    while True:
        logits = count * (windows.num_scored + 1) * vocabulary * 2
        rows = ROWS_AT_A_TIME * vocabulary * 4
        found = replace(
            options,
            context_tokens=windows.num_tokens,
            kv_tokens=count * windows.num_tokens,
            extra_vram_bytes=_LOGITS_COPIES * logits + _FLOAT_COPIES * rows,
        )
        try:
            plan_for(machine, pack, found)
        except CapacityError:
            if count == 1:
                raise
            count //= 2
            continue
        return found, count


def num_vocabulary(pack: Pack) -> int:
    """How many logits a token has."""
    _, _, num_rows = head_weight(pack)
    return num_rows


def check_vocabulary(pack: Pack, of_reference: int) -> None:
    """Raises PackError unless a reference with so many logits a token can be compared with."""
    if of_reference != num_vocabulary(pack):
        raise PackError(
            f"the reference's vocabulary has {of_reference} tokens, that of {pack.path} "
            f"{num_vocabulary(pack)}: not the same model"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`num_windows` of the windows were scored; fewer than there are if it was interrupted."""

    scores: Scores
    num_windows: int
    passes: int
    interrupted: bool


def evaluate(
    model: Model,
    windows: Windows,
    at_a_time: int,
    *,
    reference: LogitsFile | None = None,
    on_windows: OnWindows = lambda count: None,
) -> Outcome:
    """Score the windows, beside a reference's logits if there is one.

    `on_windows(count)` is called after each pass. Ctrl-C ends it early: what there is comes back.
    Raises StreamError, and PackError for a reference of another vocabulary.
    """
    if reference is not None:
        check_vocabulary(model.pack, reference.num_vocabulary)
    scores, done, passes, interrupted = Scores(), 0, 0, False
    try:
        for begin in range(0, len(windows), at_a_time):
            end = min(begin + at_a_time, len(windows))
            logits = _scored(model, windows, begin, end)
            true = None
            if reference is not None:
                true = reference.logits(begin, end).flatten(0, 1)
            scores.add(logits.flatten(0, 1), windows.scored[begin:end].flatten(), true)
            done, passes = end, passes + 1
            on_windows(end - begin)
    except KeyboardInterrupt:
        interrupted = True
    return Outcome(scores=scores, num_windows=done, passes=passes, interrupted=interrupted)


def keep_logits(
    model: Model,
    windows: Windows,
    at_a_time: int,
    path: Path,
    *,
    name: str,
    on_windows: OnWindows = lambda count: None,
) -> None:
    """Write the model's logits to a file, or those that are missing from an unfinished one.

    Ctrl-C leaves that unfinished one. Raises DiskFullError, TargetError, StreamError.
    """
    with writing(path, logits_shape(model.pack, windows, name)) as writer:
        on_windows(writer.num_done)
        while writer.num_done < len(windows):
            begin = writer.num_done
            end = min(begin + at_a_time, len(windows))
            writer.append(_scored(model, windows, begin, end))
            on_windows(end - begin)


def logits_shape(pack: Pack, windows: Windows, name: str) -> LogitsShape:
    """What a file of the pack's logits holds."""
    return LogitsShape(
        windows=windows,
        num_vocabulary=num_vocabulary(pack),
        dtype=TORCH_DTYPES[pack.manifest.model.dtype],
        reference=name,
    )


def _scored(model: Model, windows: Windows, begin: int, end: int) -> torch.Tensor:
    """Logits that the scored tokens of some windows are judged by: those of the tokens before."""
    return model.logits(windows.ids[begin:end], windows.num_scored + 1)[:, :-1]
