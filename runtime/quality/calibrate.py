"""A calibration made from a pack and a text, in streamed passes; a break costs a layer's share."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from torch import nn

from layerpack.formats.calibration.inputs import layer_bytes, layer_name
from layerpack.formats.calibration.record import RECORD_NAME, Record, record_bytes
from layerpack.formats.digest import bytes_digest
from layerpack.formats.disk import sync_directory, try_lock, write_whole
from layerpack.formats.errors import DiskFullError, PromptError, TargetError
from layerpack.formats.pack import Pack
from layerpack.formats.units import human_bytes
from layerpack.runtime.model import Model
from layerpack.runtime.quality.disk_errors import disk_errors
from layerpack.runtime.quality.input_sums import (
    DAMPING,
    GROUP_COLUMNS,
    LEAST_ROWS,
    InputSums,
    LastInput,
    linear_modules,
    sums_bytes,
)
from layerpack.runtime.quality.windows import Windows

_RUN_NAME = "run.json"
_UNFINISHED_SUFFIX = ".layerpack-calibration"  # not a conversion's, which may have the same target


def record_of(pack: Pack, windows: Windows) -> Record:
    """What decides a calibration's contents, but for the machine. Raises PromptError."""
    if windows.ids.numel() < LEAST_ROWS:
        raise PromptError(
            f"{windows.ids.numel()} tokens in whole windows: too few to calibrate with, give "
            f"{LEAST_ROWS} or more (40,000 are good)"
        )
    return Record(
        producer=f"layerpack {version('layerpack')}",
        architecture=pack.manifest.model.architecture,
        num_layers=pack.manifest.model.num_layers,
        source=pack.manifest.source.id,
        text=bytes_digest(windows.ids.numpy().tobytes()),
        num_tokens=windows.ids.numel(),
        group_columns=GROUP_COLUMNS,
        damping=DAMPING,
    )


class Unfinished:
    """The directory that a calibration is made in; one process at a time. Make it with `making`."""

    def __init__(self, target: Path, partial: Path, record: Record) -> None:
        self._target, self._partial, self._record = target, partial, record
        self._digests: dict[int, str] = {}
        for layer in range(record.num_layers):
            with contextlib.suppress(FileNotFoundError):
                self._digests[layer] = bytes_digest((partial / layer_name(layer)).read_bytes())

    @property
    def missing(self) -> list[int]:
        """Layers that are not there yet."""
        return [layer for layer in range(self._record.num_layers) if layer not in self._digests]

    def put(self, layer: int, data: bytes) -> None:
        """A layer's file. Raises DiskFullError, TargetError."""
        with disk_errors(self._target):
            write_whole(self._partial / layer_name(layer), data)
        self._digests[layer] = bytes_digest(data)

    def finish(self) -> None:
        """Give it its name; every layer is there. Raises DiskFullError, TargetError."""
        digests = [self._digests[layer] for layer in range(self._record.num_layers)]
        with disk_errors(self._target):
            write_whole(self._partial / RECORD_NAME, record_bytes(self._record, digests))
            (self._partial / _RUN_NAME).unlink()
            sync_directory(self._partial)
            os.rename(self._partial, self._target)
            sync_directory(self._target.absolute().parent)


@contextlib.contextmanager
def making(target: Path, record: Record) -> Iterator[Unfinished]:
    """Make the calibration, or go on with what a break left of the same. Raises TargetError."""
    if target.exists() or target.is_symlink():
        raise TargetError(f"{target}: is there already; remove it, or give another name")
    partial = target.with_name(target.name + _UNFINISHED_SUFFIX)
    run = record_bytes(record, [])
    with disk_errors(target):
        partial.mkdir(exist_ok=True)
        handle = os.open(partial / _RUN_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not try_lock(handle):
            raise TargetError(f"{target}: another process is making it")
        try:
            with disk_errors(target):
                _begin(partial, handle, run)
            yield Unfinished(target, partial, record)
        finally:
            if not any(partial.glob("layer-*")):  # what is not a calibration's stays
                with contextlib.suppress(OSError):
                    (partial / _RUN_NAME).unlink()
                    partial.rmdir()
    finally:
        os.close(handle)


def _begin(partial: Path, handle: int, run: bytes) -> None:
    """`handle`, of the file that says whose work lies in `partial`, says `run`."""
    if os.read(handle, len(run) + 1) == run:
        return
    if any(partial.glob("layer-*")):
        raise TargetError(
            f"{partial}: holds an unfinished calibration by another text, pack or version; finish "
            "that one, or remove the directory"
        )
    os.pwrite(handle, run, 0)
    os.ftruncate(handle, len(run))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What there is to do: the text goes through the model once for each round of layers."""

    rounds: tuple[tuple[int, ...], ...]
    disk_bytes: int

    def check_room(self, target: Path) -> None:
        """Raises DiskFullError."""
        free_bytes = shutil.disk_usage(target.absolute().parent).free
        if free_bytes < self.disk_bytes:
            raise DiskFullError(
                f"{target}: {human_bytes(self.disk_bytes)} to write, {human_bytes(free_bytes)} "
                "free; make room"
            )


def work_of(model: Model, missing: list[int], memory_bytes: int) -> Work:
    """Rounds of as many layers as fit into so much memory, at least one."""
    rounds: list[list[int]] = []
    taken_bytes = total_bytes = 0
    for layer in missing:
        needed_bytes = sums_bytes(linear_modules(_layers(model)[layer]))
        if not rounds or taken_bytes + needed_bytes > memory_bytes:
            rounds.append([])
            taken_bytes = 0
        rounds[-1].append(layer)
        taken_bytes += needed_bytes
        total_bytes += needed_bytes
    # Sums are float32, what is made of them float16.
    return Work(rounds=tuple(map(tuple, rounds)), disk_bytes=total_bytes // 2)


def calibrate(
    model: Model,
    windows: Windows,
    at_a_time: int,
    work: Work,
    unfinished: Unfinished,
    *,
    on_windows: Callable[[int], object] = lambda count: None,
) -> None:
    """Run the text through the model and write what is missing. Ctrl-C leaves whole layers.

    Raises StreamError, DiskFullError, TargetError; CalibrationError for what is not finite.
    """
    path = model.pack.manifest.model.layers_path
    num_passes = -(-len(windows) // at_a_time)
    for layers in work.rounds:
        sums = {
            layer: InputSums(f"{path}.{layer}", linear_modules(_layers(model)[layer]))
            for layer in layers
        }
        last = LastInput()
        with contextlib.ExitStack() as stack:
            for own in sums.values():
                stack.enter_context(own.watching(last))
            for number in range(num_passes):
                some = windows.ids[number::num_passes]  # from all over the text
                model.logits(some, 1)
                on_windows(len(some))
        for layer in layers:
            unfinished.put(layer, layer_bytes(*sums.pop(layer).found()))


def _layers(model: Model) -> list[nn.Module]:
    return list(model.network.get_submodule(model.pack.manifest.model.layers_path))
