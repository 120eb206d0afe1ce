"""On a CUDA device: equality with transformers, and no slot read or overwritten out of turn."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models.oracles import quantised_reference
from support.models.tiny import ARCHITECTURES

from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits, Tier
from layerpack.runtime.stream import lane as lane_module

pytestmark = pytest.mark.gpu

PackOf = Callable[..., Path]
IDS = torch.tensor([[7, 201, 33, 90, 90, 5, 250, 118, 64, 2, 19]])
WAYS = {
    "host, 2 slots": Limits(vram_slices=0, num_slots=2),
    "host, 3 slots": Limits(vram_slices=0, num_slots=3),
    "disk, 2 slots": Limits(vram_slices=0, host_slices=0, num_slots=2),
    "disk, 3 slots": Limits(vram_slices=0, host_slices=0, num_slots=3),
    "all three": Limits(vram_slices=1, host_slices=1, num_slots=3),
    "all resident": Limits(),
}


def open_options(limits: Limits, **fields: object) -> OpenOptions:
    return OpenOptions(device="cuda", limits=limits, context_tokens=64, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_greedy_tokens_equal_the_reference(
    pack_of: PackOf, name: str, double_quant: bool
) -> None:
    pack = pack_of(name, double_quant=double_quant)
    reference = quantised_reference(pack, "cuda")
    ids = IDS.cuda()
    with torch.no_grad():
        logits = reference(ids).logits
    tokens = reference.generate(ids, max_new_tokens=12, do_sample=False)
    for title, limits in WAYS.items():
        with Model.open(pack, open_options(limits)) as model:
            for _ in range(2):
                with torch.no_grad():
                    found = model.network(ids).logits
                if len([part for part in model.plan.slices if part.rows]) == 1:
                    assert torch.equal(found, logits), title
                else:  # lm_head in parts: other matmul shapes, so bf16 rounding
                    torch.testing.assert_close(found, logits, rtol=0.016, atol=0.05, msg=title)
            again = model.network.generate(
                ids, max_new_tokens=12, do_sample=False, disable_compile=True
            )
            assert torch.equal(again, tokens), title


@pytest.mark.parametrize("may_register", [True, False], ids=["registered", "copied"])
def test_host_tier_by_registering_equals_copying(pack_of: PackOf, may_register: bool) -> None:
    pack = pack_of("llama")
    options = open_options(WAYS["host, 2 slots"], may_register=may_register)
    with torch.no_grad():
        logits = quantised_reference(pack, "cuda")(IDS.cuda()).logits
        with Model.open(pack, options) as model:
            assert model.plan.tiers.count(Tier.HOST) == len(model.plan.tiers)
            torch.testing.assert_close(
                model.network(IDS.cuda()).logits, logits, rtol=0.016, atol=0.05
            )


def shuffled(
    monkeypatch: pytest.MonkeyPatch, seed: int, slow: str, longest_cycles: int = 3_000_000
) -> None:
    """Puts random GPU-side pauses before copies, or before the release of slots."""
    rng = random.Random(seed)
    copy, mark_free = lane_module.CudaLane.copy, lane_module.CudaLane.mark_free

    def slow_copy(self: lane_module.CudaLane, slot: int, offset: int, source: torch.Tensor) -> None:
        if slow in ("copy", "both"):
            with torch.cuda.stream(self._copy_stream):
                torch.cuda._sleep(rng.randrange(longest_cycles))
        copy(self, slot, offset, source)

    def slow_mark_free(self: lane_module.CudaLane, slot: int) -> None:
        if slow in ("work", "both"):
            torch.cuda._sleep(rng.randrange(longest_cycles))
        mark_free(self, slot)

    monkeypatch.setattr(lane_module.CudaLane, "copy", slow_copy)
    monkeypatch.setattr(lane_module.CudaLane, "mark_free", slow_mark_free)


def passes_differ(pack: Path, limits: Limits, expected: torch.Tensor, passes: int = 12) -> int:
    ids = IDS.cuda()
    with Model.open(pack, open_options(limits)) as model:
        # The slow layer must read its slot late as well: a pause before its last projection.
        for layer in model.network.model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(lambda *_: torch.cuda._sleep(1_000_000))
        with torch.no_grad():
            found = [model.network(ids).logits for _ in range(passes)]
        torch.cuda.synchronize()
    return sum(not torch.equal(logits, expected) for logits in found)


@pytest.mark.parametrize("slow", ["copy", "work", "both"])
@pytest.mark.parametrize(
    "way", ["host, 2 slots", "host, 3 slots", "disk, 2 slots", "disk, 3 slots"]
)
def test_shuffled_timing_changes_nothing(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, way: str, slow: str
) -> None:
    pack = pack_of("llama-tied")
    with Model.open(pack, open_options(WAYS[way])) as model, torch.no_grad():
        expected = model.network(IDS.cuda()).logits
    for seed in range(3):
        with monkeypatch.context() as patch:
            shuffled(patch, seed, slow)
            assert passes_differ(pack, WAYS[way], expected) == 0


@pytest.mark.parametrize(
    ("wait", "slow"), [("wait_ready", "copy"), ("begin_copy", "work")], ids=["ready", "free"]
)
@pytest.mark.parametrize("way", ["host, 2 slots", "host, 3 slots"])
def test_either_event_wait_taken_out_is_noticed(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, way: str, wait: str, slow: str
) -> None:
    pack = pack_of("llama-tied")
    with Model.open(pack, open_options(WAYS[way])) as model, torch.no_grad():
        expected = model.network(IDS.cuda()).logits
    # Longer pauses than the host takes to order a layer, or it would do the missing wait's work.
    shuffled(monkeypatch, 1, slow, longest_cycles=40_000_000)
    monkeypatch.setattr(lane_module.CudaLane, wait, lambda self, slot: None)
    assert passes_differ(pack, WAYS[way], expected) > 0


def test_closing_undoes_everything(pack_of: PackOf) -> None:
    pack = pack_of("llama")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):  # registering the same pages twice fails unless they were unregistered
        with Model.open(pack, open_options(WAYS["all three"])) as model, torch.no_grad():
            model.network(IDS.cuda())
        del model
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_conversion_on_cuda_gives_the_bytes_of_the_cpu(pack_of: PackOf) -> None:
    for double_quant in (True, False):
        on_gpu = pack_of("llama-odd", double_quant=double_quant, device="cuda")
        on_cpu = pack_of("llama-odd", double_quant=double_quant, device="cpu")
        for file in sorted(on_cpu.glob("*.safetensors")):
            assert file.read_bytes() == (on_gpu / file.name).read_bytes(), file.name
