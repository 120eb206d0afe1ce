"""Where a generation ends, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.models.oracles import quantised_reference

from layerpack.formats.errors import PackError
from layerpack.runtime import GenerateOptions, Model, OpenOptions
from layerpack.runtime.engine.prompt import encode_prompt

ON_CPU = OpenOptions(device="cpu")
WANTED = GenerateOptions(max_new_tokens=20)


def test_every_end_in_generation_config_ends_the_text(pack: Path) -> None:
    """Many chat models name the end of a turn there alone."""
    with Model.open(pack, ON_CPU) as model:
        whole = model.generate("hello", WANTED)
    assert whole.finish == "length"
    end = whole.token_ids[5]
    file = pack / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [257, end]}))
    reference = quantised_reference(pack)
    with Model.open(pack, ON_CPU) as model:
        ended = model.generate("hello", WANTED)
        ids = torch.tensor([encode_prompt(model.tokenizer, "hello", WANTED)])
        drafted = model.generate(
            "hello", GenerateOptions(max_new_tokens=20, prompt_lookup_tokens=4)
        )
    assert ended.finish == drafted.finish == "stop"
    wanted = reference.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert list(ended.token_ids) == list(drafted.token_ids) == wanted.tolist()
    assert len(ended.token_ids) <= 6


@pytest.mark.parametrize("temperature", [1e-40, 1e-6])
def test_next_to_no_temperature_takes_the_likeliest_token(pack: Path, temperature: float) -> None:
    """Or one of them, where logits tie."""
    wanted = GenerateOptions(max_new_tokens=20, temperature=temperature, seed=1)
    with Model.open(pack, ON_CPU) as model, torch.no_grad():
        found = model.generate("hello", wanted)
        ids = [*encode_prompt(model.tokenizer, "hello", wanted), *found.token_ids]
        logits = model.network(torch.tensor([ids])).logits[0, found.prompt_tokens - 1 : -1]
    of_found = logits.gather(1, torch.tensor(found.token_ids)[:, None])[:, 0]
    # A pass of one token rounds otherwise than one of all of them.
    torch.testing.assert_close(of_found, logits.amax(1), atol=0.1, rtol=0.02)


def test_a_pack_without_generation_config_ends_by_its_config(pack: Path) -> None:
    (pack / "generation_config.json").unlink()
    with Model.open(pack, ON_CPU) as model:
        assert model.network.generation_config.eos_token_id == 257


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not usable"),
        ("[]", "not a JSON object"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is no token id: '</s>'"),
        ('{"eos_token_id": [257, null]}', "eos_token_id is no token id"),
        ('{"pad_token_id": [257]}', "pad_token_id is no token id"),
    ],
)
def test_a_generation_config_that_is_none_is_named(pack: Path, text: str, words: str) -> None:
    (pack / "generation_config.json").write_text(text)
    named = pytest.raises(PackError, match=f"generation_config.json: {words}.*; convert again")
    with named, Model.open(pack, ON_CPU):
        pytest.fail("it is open")
