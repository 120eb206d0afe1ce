"""A streamed model gives what transformers gives from the same pack, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models.oracles import quantised_reference
from support.models.tiny import ARCHITECTURES

from layerpack.convert.api import convert
from layerpack.convert.options import ConvertOptions
from layerpack.runtime.core.slices import Kind
from layerpack.runtime.model import Model
from layerpack.runtime.network import head
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits, Tier

PackOf = Callable[..., Path]
IDS = torch.tensor([[7, 201, 33, 90, 90, 5, 250, 118, 64, 2, 19]])
WAYS = {
    "mapped": Limits(),
    "two slots": Limits(host_slices=0, num_slots=2),
    "mixed": Limits(host_slices=1, num_slots=2),
}


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_greedy_tokens_equal_the_reference(
    pack_of: PackOf, name: str, double_quant: bool
) -> None:
    pack = pack_of(name, double_quant=double_quant)
    reference = quantised_reference(pack)
    with torch.no_grad():
        logits = reference(IDS).logits
    tokens = reference.generate(IDS, max_new_tokens=12, do_sample=False)
    for title, limits in WAYS.items():
        with Model.open(pack, OpenOptions(device="cpu", limits=limits)) as model:
            for _ in range(2):  # the second pass uses slots that the first one filled
                with torch.no_grad():
                    assert torch.equal(model.network(IDS).logits, logits), title
            found = model.network.generate(
                IDS, max_new_tokens=12, do_sample=False, disable_compile=True
            )
            assert torch.equal(found, tokens), title


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_quantised_head_equals_the_reference(pack_of: PackOf, name: str) -> None:
    pack = pack_of(name, nf4_head=True)
    with torch.no_grad():
        logits = quantised_reference(pack)(IDS).logits
    for title, limits in WAYS.items():
        with Model.open(pack, OpenOptions(device="cpu", limits=limits)) as model:
            with torch.no_grad():
                found = model.network(IDS).logits
            torch.testing.assert_close(found, logits, rtol=0.02, atol=0.02, msg=title)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_quantised_head_in_several_parts_equals_the_reference(
    checkpoint_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, double_quant: bool
) -> None:
    source, pack = checkpoint_of("llama", vocab_size=3000), tmp_path / "pack"
    convert(str(source), pack, ConvertOptions(nf4_head=True, double_quant=double_quant))
    with torch.no_grad():
        logits = quantised_reference(pack)(IDS).logits
    limits = WAYS["two slots"]
    with Model.open(pack, OpenOptions(device="cpu", limits=limits)) as model, torch.no_grad():
        assert sum(part.kind is Kind.HEAD for part in model.plan.slices) == 3
        # Made when opening: on a GPU the host would wait for it in each pass.
        monkeypatch.setattr(head, "quant_state", lambda *_: pytest.fail("made in a pass"))
        monkeypatch.setattr(head, "offset_tensor", lambda *_: pytest.fail("made in a pass"))
        for _ in range(2):
            found = model.network(IDS).logits
            torch.testing.assert_close(found, logits, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("vocab_size", [300, 301])
def test_a_quantised_head_of_odd_width_equals_the_reference(
    checkpoint_of: PackOf, tmp_path: Path, vocab_size: int
) -> None:
    source = checkpoint_of(
        "llama-odd", hidden_size=35, num_attention_heads=1, vocab_size=vocab_size
    )
    convert(str(source), tmp_path / "pack", ConvertOptions(nf4_head=True))
    with torch.no_grad():
        logits = quantised_reference(tmp_path / "pack")(IDS).logits
    for title, limits in WAYS.items():
        options = OpenOptions(device="cpu", limits=limits)
        with Model.open(tmp_path / "pack", options) as model, torch.no_grad():
            found = model.network(IDS).logits
            torch.testing.assert_close(found, logits, rtol=0.02, atol=0.02, msg=title)


def test_tiers_are_as_asked_for(pack_of: PackOf) -> None:
    with Model.open(pack_of("llama"), OpenOptions(device="cpu", limits=WAYS["mixed"])) as model:
        assert model.plan.tiers.count(Tier.HOST) == 1
        assert set(model.plan.tiers) == {Tier.HOST, Tier.DISK}


def test_a_pass_that_broke_off_leaves_the_next_one_right(pack_of: PackOf) -> None:
    pack = pack_of("llama-tied")
    limits = Limits(host_slices=0, num_slots=2)
    with Model.open(pack, OpenOptions(device="cpu", limits=limits)) as model, torch.no_grad():
        whole = model.network(IDS).logits
        for layer in model.network.model.layers:

            def stop(*_: object) -> None:
                raise KeyboardInterrupt

            hook = layer.mlp.register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                model.network(IDS)
            hook.remove()
            assert torch.equal(model.network(IDS).logits, whole)
