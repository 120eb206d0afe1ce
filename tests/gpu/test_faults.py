"""On a CUDA device: full memory, a cap on it, and a second process; nothing stays behind."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs.cuda import IDS, logits_of, options, tiers
from support.runs.faults import nothing_left

from layerpack.formats.errors import CapacityError, StreamError
from layerpack.runtime import opening
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits, Tier
from layerpack.runtime.planning import plan_for

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("same_vram_after")]


@tiers
def test_a_device_that_fills_up_while_opening_says_so(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int], tier: str
) -> None:
    whole = logits_of(pack, options(tier))
    taken: list[torch.Tensor] = []

    def then_fill(*arguments: Any) -> Any:
        result = plan_for(*arguments)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-9)  # what somebody else takes is gone, too
        for size_bytes in (1 << 20, 1 << 14, 512):  # what this process has taken, but not in use
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    taken.append(torch.empty(size_bytes, dtype=torch.uint8, device="cuda"))
        return result

    try:
        with monkeypatch.context() as patch, nothing_left(pack, within_s=60):
            patch.setattr(opening, "plan_for", then_fill)
            with pytest.raises(CapacityError, match="the device ran out of memory while"):
                logits_of(pack, options(tier))
    finally:
        taken.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not registered
    assert torch.equal(logits_of(pack, options(tier)), whole)


@tiers
def test_a_device_that_fills_up_in_a_pass_says_so(
    pack: Path, registered: set[int], tier: str
) -> None:
    with nothing_left(pack, within_s=60), Model.open(pack, options(tier)) as opened:
        wanted = GenerateOptions(max_new_tokens=4, raw=True)
        whole = opened.generate("hello", wanted).token_ids

        def fill(*_: object) -> None:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

        hook = opened.network.model.layers[1].mlp.register_forward_pre_hook(fill)
        with pytest.raises(StreamError, match="the device ran out of memory in a pass"):
            opened.generate("hello", wanted)
        hook.remove()
        assert opened.generate("hello", wanted).token_ids == whole
    assert not registered


def test_a_cap_on_vram_ends_with_the_model(pack: Path) -> None:
    limits = Limits(vram_bytes=1 << 30)
    capped = OpenOptions(device="cuda", limits=limits, context_tokens=64)
    with Model.open(pack, capped), pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    torch.empty(2 << 30, dtype=torch.uint8, device="cuda")


OTHER_PROCESS = """
import sys
import torch
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits
limits = Limits(vram_slices=0, host_slices=2)
options = OpenOptions(device="cuda", limits=limits, context_tokens=64)
with Model.open(sys.argv[1], options) as model, torch.no_grad():
    ids = torch.tensor([[7, 201, 33, 90, 5]], device="cuda")
    print(model.network(ids).logits.float().sum().item(), flush=True)
    sys.stdin.readline()
"""


def test_two_processes_register_one_pack(pack: Path) -> None:
    how = OpenOptions(device="cuda", limits=Limits(vram_slices=0, host_slices=2), context_tokens=64)
    command = [sys.executable, "-c", OTHER_PROCESS, str(pack)]
    with (
        Model.open(pack, how) as opened,
        torch.no_grad(),
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as other,
    ):
        assert opened.plan.tiers.count(Tier.HOST) == 2
        assert other.stdout is not None
        line = other.stdout.readline()
        mine = opened.network(IDS.cuda()).logits
        _, errors = other.communicate("go on\n", timeout=60)
        assert other.returncode == 0, errors
        assert float(line) == mine.float().sum().item()
