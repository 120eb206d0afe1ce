"""Compressed packs on a CUDA device: from every tier what the plain pack gives, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.packs.comparing import compressed

from layerpack.convert import ConvertOptions, convert
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits, Tier

pytestmark = pytest.mark.gpu

IDS = torch.tensor([[7, 201, 33, 90, 90, 5, 250, 118, 64, 2, 19]])
WAYS = {
    "host": Limits(vram_slices=0, num_slots=2),
    "disk": Limits(vram_slices=0, host_slices=0, num_slots=2),
    "all three": Limits(vram_slices=1, host_slices=1, num_slots=3),
    "all resident": Limits(),
}


@pytest.mark.parametrize("direct", [None, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("name", ["llama-tied", "llama-odd", "qwen2", "gemma3"])
def test_the_same_logits_and_tokens(
    checkpoint_of: Callable[..., Path], tmp_path: Path, name: str, direct: bool | None
) -> None:
    source = str(checkpoint_of(name))
    convert(source, tmp_path / "plain", ConvertOptions(device="cpu"))
    with compressed(32768):
        convert(source, tmp_path / "packed", ConvertOptions(device="cpu", zstd_level=1))
    ids = IDS.cuda()
    for title, limits in WAYS.items():
        opening = OpenOptions(device="cuda", limits=limits, context_tokens=64, direct=direct)
        with Model.open(tmp_path / "plain", opening) as model, torch.no_grad():
            logits = model.network(ids).logits
            tokens = model.network.generate(
                ids, max_new_tokens=8, do_sample=False, disable_compile=True
            )
        with Model.open(tmp_path / "packed", opening) as model, torch.no_grad():
            for _ in range(3):
                assert torch.equal(model.network(ids).logits, logits), title
            again = model.network.generate(
                ids, max_new_tokens=8, do_sample=False, disable_compile=True
            )
            assert torch.equal(again, tokens), title
            assert model.plan.compression is not None
            disk = model.plan.tiers.count(Tier.DISK)
            assert bool(disk) == bool(model.plan.compression.raw_bytes), title


def test_closing_leaves_no_memory_behind(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    with compressed(32768):
        convert(str(checkpoint_of("llama")), tmp_path / "packed", ConvertOptions(zstd_level=1))
    opening = OpenOptions(device="cuda", limits=WAYS["all three"], context_tokens=64)
    allocated = []
    for _ in range(10):
        with Model.open(tmp_path / "packed", opening) as model, torch.no_grad():
            model.network(IDS.cuda())
        del model
        allocated.append(torch.cuda.memory_allocated())
    # The first one of a process gets cuBLAS its workspace, which stays.
    assert allocated[-1] == allocated[0]
