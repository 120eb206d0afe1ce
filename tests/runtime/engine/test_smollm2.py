"""A real model, SmolLM2-135M: what transformers makes of the same pack, and speculation."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models.oracles import quantised_reference
from support.packs.comparing import differing
from support.runs.rows import in_a_tree, one_by_one

from layerpack.convert.api import convert
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.prompt import encode_prompt
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits

PackFrom = Callable[[str], Path]
QUESTION = "What is the capital of France?"
STORY = "Write a short story about a lighthouse keeper and her cat."
"""In plain decoding the 21st token of its answer ties with another one to the last bit."""
WAYS = {
    "gguf": {"mapped": Limits()},
    "checkpoint": {
        "mapped": Limits(),
        "two slots": Limits(host_slices=0, num_slots=2),
        "mixed": Limits(host_slices=15),
    },
}


@pytest.fixture(scope="module")
def pack_from(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackFrom:
    """`pack_from("gguf")`, `pack_from("checkpoint")`: the model converted from either."""
    made: dict[str, Path] = {}

    def get(source: str) -> Path:
        if source not in made:
            made[source] = tmp_path_factory.mktemp("smollm2") / source
            convert(str(request.getfixturevalue(f"smollm2_{source}")), made[source])
        return made[source]

    return get


def test_both_sources_give_the_same_weights(pack_from: PackFrom) -> None:
    other_files = set(differing(pack_from("gguf"), pack_from("checkpoint")))
    assert not [name for name in other_files if name.endswith(".safetensors")]
    assert "tokenizer.json" not in other_files


@pytest.mark.parametrize("source", WAYS)
def test_logits_and_greedy_text_equal_the_reference(pack_from: PackFrom, source: str) -> None:
    pack = pack_from(source)
    wanted = GenerateOptions(max_new_tokens=12)
    reference = quantised_reference(pack)
    ids: torch.Tensor | None = None
    for title, limits in WAYS[source].items():
        with Model.open(pack, OpenOptions(device="cpu", limits=limits)) as model:
            if ids is None:
                ids = torch.tensor([encode_prompt(model.tokenizer, QUESTION, wanted)])
                with torch.no_grad():
                    logits = reference(ids).logits
                tokens = reference.generate(ids, max_new_tokens=12, do_sample=False)
                text = model.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
            with torch.no_grad():
                assert torch.equal(model.network(ids).logits, logits), title
            found = model.generate(QUESTION, wanted)
        assert list(found.token_ids) == tokens[0, ids.shape[1] :].tolist(), title
        assert found.text == text
    assert "Paris" in text


def test_with_itself_as_draft(pack_from: PackFrom) -> None:
    pack = pack_from("checkpoint")
    with Model.open(pack, OpenOptions(device="cpu", draft=str(pack))) as model:
        plain = model.generate(STORY, GenerateOptions(max_new_tokens=16, draft_tokens=0))
        drafted = model.generate(STORY, GenerateOptions(max_new_tokens=16))
    assert len(plain.token_ids) == plain.passes == 16
    assert drafted.token_ids == plain.token_ids and drafted.text == plain.text
    assert drafted.passes <= plain.passes / 2
    assert drafted.accepted_tokens == 16 - drafted.passes <= drafted.proposed_tokens


def test_bits_and_text_however_tokens_are_tried(pack_from: PackFrom) -> None:
    with Model.open(pack_from("checkpoint"), OpenOptions(device="cpu")) as model:
        assert model.rows is not None
        ids = encode_prompt(model.tokenizer, STORY, GenerateOptions())[:30]
        alone = one_by_one(model.rows, ids)
        found = in_a_tree(model.rows, ids, 18, random.Random(4))
        assert torch.equal(found, alone[17:])
        sampled = GenerateOptions(max_new_tokens=10, temperature=0.8, seed=3)
        looked_up = replace(sampled, prompt_lookup_tokens=8)
        plain = model.generate(STORY, sampled)
        assert model.generate(STORY, looked_up).token_ids == plain.token_ids
