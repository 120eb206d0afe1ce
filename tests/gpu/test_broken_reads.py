"""On a CUDA device: reads that break and files that shrink; nothing stays behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs.cuda import IDS, logits_of, options
from support.runs.faults import Disk, nothing_left

from layerpack.formats.errors import StreamError
from layerpack.runtime import opening
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.model import Model
from layerpack.runtime.planning import plan_for
from layerpack.runtime.stream import host_tier
from layerpack.runtime.stream.mapped import map_slice

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("same_vram_after")]


@pytest.mark.parametrize("kind", ["error", "short", "death"])
@pytest.mark.parametrize("tier", ["disk", "mixed"])
def test_a_broken_read_in_a_pass_ends_it(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int], tier: str, kind: str
) -> None:
    disk = Disk(monkeypatch)
    whole = logits_of(pack, options(tier))
    with (
        nothing_left(pack, within_s=60),
        Model.open(pack, options(tier, direct=False)) as opened,
        torch.no_grad(),
    ):
        assert torch.equal(opened.network(IDS.cuda()).logits.cpu(), whole)
        disk.arm(kind)
        with pytest.raises(StreamError):
            for _ in range(60):  # what was read ahead is used up first
                opened.network(IDS.cuda())
        disk.disarm()
        assert torch.equal(opened.network(IDS.cuda()).logits.cpu(), whole)
    assert not registered


@pytest.mark.parametrize("tier", ["VRAM", "mixed"])
def test_a_broken_read_of_resident_layers_ends_opening(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int], tier: str
) -> None:
    disk = Disk(monkeypatch)
    logits_of(pack, options(tier))

    def then_break(*arguments: Any) -> Any:
        result = plan_for(*arguments)
        disk.arm("error", after=2)  # the first read asks whether direct reads are possible
        return result

    with monkeypatch.context() as patch, nothing_left(pack, within_s=60):
        patch.setattr(opening, "plan_for", then_break)
        with pytest.raises(StreamError, match="EIO"):
            logits_of(pack, options(tier))
    disk.disarm()
    assert not registered
    logits_of(pack, options(tier))


def test_a_file_that_shrinks_before_it_is_registered_is_named(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int]
) -> None:

    def then_truncate(part: Slice) -> torch.Tensor:
        mapped = map_slice(part)
        if part.index == 2:
            os.truncate(part.path, 4096)
        return mapped

    monkeypatch.setattr(host_tier, "map_slice", then_truncate)
    with nothing_left(pack, within_s=60), pytest.raises(StreamError, match="become shorter"):
        logits_of(pack, options("host"))
    assert not registered
