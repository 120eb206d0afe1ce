"""The reserved KV cache holds what transformers' own holds, in memory that never moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import ARCHITECTURES
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from layerpack.runtime.kv.reserved import ReservedLayer, reserved_cache

CheckpointOf = Callable[..., Path]
IDS = torch.tensor([[7, 201, 33, 90, 90, 5, 250, 118, 64, 2, 19]])


@pytest.mark.parametrize("max_tokens", [64, 14], ids=["enough", "outgrown"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_those_over_transformers_own_cache(
    checkpoint_of: CheckpointOf, name: str, max_tokens: int
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint_of(name)).eval()
    own, ours = DynamicCache(config=model.config), reserved_cache(model.config, max_tokens)
    with torch.no_grad():
        for ids in (IDS, IDS[:, :1], IDS[:, 3:5], IDS[:, :3]):
            wanted = model(ids, past_key_values=own).logits
            assert torch.equal(model(ids, past_key_values=ours).logits, wanted)
            for cache in (own, ours):  # as a checked draft is taken back
                cache.crop(-1)


def states(number: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.full((1, 2, count, 4), float(number))
    return keys, -keys


def test_memory_is_taken_once_and_never_moves() -> None:
    layer = ReservedLayer(10)
    keys, values = layer.update(*states(1, 3))
    places = keys.data_ptr(), values.data_ptr()
    for number in range(2, 9):
        keys, values = layer.update(*states(number, 1))
        assert (keys.data_ptr(), values.data_ptr()) == places
        assert layer.get_seq_length() == keys.shape[-2] == number + 2
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 2, 3, 4, 5, 6, 7, 8]
    assert torch.equal(values, -keys)


def test_a_batch_that_was_rearranged_goes_on_by_concatenation() -> None:
    layer = ReservedLayer(10)
    layer.update(*states(1, 2))
    layer.batch_repeat_interleave(3)
    keys, _ = layer.update(*(state.repeat(3, 1, 1, 1) for state in states(5, 1)))
    assert keys.shape == (3, 2, 3, 4)
    assert keys[2, 1, :, 0].tolist() == [1, 1, 5]


def test_reset_starts_over() -> None:
    layer = ReservedLayer(10)
    layer.update(*states(1, 4))
    layer.reset()
    keys, _ = layer.update(*states(2, 2))
    assert keys[0, 0, :, 0].tolist() == [2, 2]
