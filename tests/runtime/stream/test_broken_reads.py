"""A read that fails, ends early, dies or hangs ends the run in bounded time; the next run works."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs.cpu import FROM_DISK, load_host, logits_of
from support.runs.faults import Disk, nothing_left

from layerpack.formats.errors import StalledError, StreamError
from layerpack.formats.pack import Pack
from layerpack.formats.read import BufferedReader
from layerpack.runtime import opening
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Slice, pass_slices
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.planning import plan_for
from layerpack.runtime.stream.vram_tier import load_vram as load_vram_tier

FAULTS = {
    "error": (StreamError, r"reading \d+ bytes from \d+ failed \(Input/output error, EIO\)"),
    "short": (StreamError, r"ends at byte \d+, wanted \d+ bytes .* run `layerpack verify`"),
    "death": (StreamError, r"a reader thread died: MemoryError"),
    "hang": (StalledError, r"no bytes of \w+ \d from .* the disk does not answer"),
}
faults = pytest.mark.parametrize("kind", FAULTS)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def run(pack: Path, options: OpenOptions, begin: Callable[[str], None]) -> None:
    """Open, prefill and decode; `begin(stage)` is called as each of them begins."""
    begin("measure")
    with Model.open(pack, options) as opened:
        begin("prefill")
        passes = []

        def count(*_: object) -> None:
            passes.append(1)
            if len(passes) == 3:
                begin("decode")

        opened.network.register_forward_pre_hook(count)
        opened.generate("hello", GenerateOptions(max_new_tokens=40))


@faults
@pytest.mark.parametrize("stage", ["measure", "ring", "prefill", "decode"])
def test_a_broken_read_ends_the_run(
    pack: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, stage: str, kind: str
) -> None:
    whole = logits_of(pack, FROM_DISK)

    def planned(*arguments: Any) -> Any:
        result = plan_for(*arguments)
        begin("ring")
        return result

    def begin(now: str) -> None:
        if now == stage:
            disk.arm(kind, after={"measure": 1, "ring": 2}.get(stage, 0))

    expected, words = FAULTS[kind]
    with monkeypatch.context() as patch, nothing_left(pack):
        patch.setattr(opening, "plan_for", planned)
        with pytest.raises(expected, match=words):
            run(pack, FROM_DISK, begin)
    disk.disarm()
    assert torch.equal(logits_of(pack, FROM_DISK), whole)


def load_vram(slices: tuple[Slice, ...]) -> None:
    with closing(BufferedReader()) as reader:
        load_vram_tier(slices, reader, torch.device("cpu"), Patience(0.4))


@faults
@pytest.mark.parametrize("load", [load_host, load_vram])
def test_a_broken_read_ends_the_loading(
    pack: Path, disk: Disk, load: Callable[[tuple[Slice, ...]], None], kind: str
) -> None:
    slices = pass_slices(Pack.open(pack))
    load(slices)
    expected, words = FAULTS[kind]
    with nothing_left(pack), pytest.raises(expected, match=words):
        disk.arm(kind, after=1)
        load(slices)
    disk.disarm()
    load(slices)
