"""On a CUDA device: the GPU's clock sees every copy and layer, and speculation changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits, Tier
from layerpack.runtime.trace.profile import format_profile, profile_steps
from layerpack.runtime.trace.trace import Trace

pytestmark = pytest.mark.gpu

PackOf = Callable[..., Path]
WAYS = {
    "host": Limits(vram_slices=0),
    "disk": Limits(vram_slices=0, host_slices=0, num_slots=2),
    "all three": Limits(vram_slices=1, host_slices=1),
    "all resident": Limits(),
}
PROMPT = "hello there, this is a test of some text"


def options(limits: Limits, draft: Path | None = None) -> OpenOptions:
    name = None if draft is None else str(draft)
    return OpenOptions(device="cuda", limits=limits, context_tokens=200, draft=name)


@pytest.mark.parametrize("way", WAYS)
def test_every_copy_and_layer_is_timed(pack_of: PackOf, way: str) -> None:
    trace = Trace()
    with Model.open(pack_of("llama"), options(WAYS[way]), trace=trace) as model:
        plain = model.generate(PROMPT, GenerateOptions(max_new_tokens=8))
        plan, machine = model.plan, model.machine
    steps = profile_steps(trace.spans)
    assert len(steps) == len(plain.token_ids) == 8
    moved = [part for part, tier in zip(plan.slices, plan.tiers, strict=True) if tier != Tier.VRAM]
    on_gpu = [span for span in trace.spans if span.row.startswith("gpu")]
    assert all(span.end_s >= span.begin_s for span in on_gpu)
    for row, titles in (
        ("gpu compute", {part.title for part in plan.slices}),
        ("gpu wait", {part.title for part in moved}),
        ("gpu copy", {part.title for part in moved}),
    ):
        names = [span.name for span in on_gpu if span.row == row]
        assert set(names) == titles
        assert len(names) >= 8 * len(titles)
    assert sum(s.moved_bytes for s in on_gpu) >= 8 * plan.streamed_bytes
    for step in steps:
        assert 0 < step.compute_s < step.total_s
        assert (step.wait_s > 0) == bool(moved)
    assert ("link: " in format_profile(steps, machine)) == bool(moved)
    with Model.open(pack_of("llama"), options(WAYS[way])) as model:
        again = model.generate(PROMPT, GenerateOptions(max_new_tokens=8))
    assert again.token_ids == plain.token_ids


@pytest.mark.parametrize("name", ["llama", "llama-odd", "qwen2", "gemma3", "gpt_neox"])
def test_the_text_is_that_without_a_draft(pack_of: PackOf, name: str) -> None:
    pack = pack_of(name)
    with Model.open(pack, options(Limits(vram_slices=0, host_slices=1), draft=pack)) as model:
        plain = model.generate(PROMPT, GenerateOptions(max_new_tokens=40, draft_tokens=0))
        drafted = model.generate(PROMPT, GenerateOptions(max_new_tokens=40, draft_tokens=64))
        looked_up = GenerateOptions(max_new_tokens=40, draft_tokens=0, prompt_lookup_tokens=5)
        assert model.generate(PROMPT, looked_up).token_ids == plain.token_ids
        assert "".join(model.stream(PROMPT, GenerateOptions(max_new_tokens=40))) == plain.text
    assert drafted.token_ids == plain.token_ids
    assert drafted.passes < plain.passes


def test_a_plain_checkpoint_as_draft(pack_of: PackOf, checkpoint_of: Callable[..., Path]) -> None:
    draft = checkpoint_of("llama")
    allocated: list[int] = []
    for _ in range(3):
        with Model.open(pack_of("llama"), options(WAYS["host"], draft=draft)) as model:
            plain = model.generate(PROMPT, GenerateOptions(max_new_tokens=40, draft_tokens=0))
            drafted = model.generate(PROMPT, GenerateOptions(max_new_tokens=40, draft_tokens=7))
            assert model.draft is not None and model.draft.network.device.type == "cuda"
        assert drafted.token_ids == plain.token_ids and drafted.accepted_tokens > 0
        assert model.draft is None
        gc.collect()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[0] == allocated[2]
