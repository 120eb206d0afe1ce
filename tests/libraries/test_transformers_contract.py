"""What layerpack/libraries/transformers_*.py take from inside transformers is there."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig
from transformers import modeling_rope_utils as rope

from layerpack.libraries import transformers_api

TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def tiny(**fields: Any) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**TINY, **fields))
    return model


def test_a_part_of_a_model_initialises_its_buffers() -> None:
    """PreTrainedModel._init_weights computes a rotary embedding's `inv_freq`."""
    model = tiny()
    transformers_api.fill_buffers(model, torch.device("cpu"))
    (table,) = (b for name, b in model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    assert table[0] == 1 and not table.is_meta


def test_a_models_forward_names_its_cache() -> None:
    """`cache`, or `past_key_values` before 5.24; `logits_to_keep`; `cache_params` of others."""
    known = inspect.signature(type(tiny()).forward).parameters
    assert not known.keys().isdisjoint({"cache", "past_key_values"}) and "logits_to_keep" in known
    assert transformers_api.takes_kv_cache(tiny())


def test_what_is_renamed_and_ignored_on_loading() -> None:
    """conversion_mapping.get_model_conversion_mapping, core_model_loading.WeightRenaming."""
    model = tiny()
    assert transformers_api.canonical_names(model)("model.norm.weight") == "model.norm.weight"
    assert isinstance(transformers_api.ignored_patterns(model), tuple)


def test_which_types_there_are() -> None:
    """CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES."""
    assert transformers_api.default_fields("llama")["model_type"] == "llama"
    assert transformers_api.has_causal_model(PhiConfig())
    assert transformers_api.is_encoder("bert") and not transformers_api.is_encoder("llama")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_keep_their_tables_where_they_did(kind: str) -> None:
    """ROPE_INIT_FUNCTIONS, `rope_type`, `inv_freq`, `original_inv_freq`, `max_seq_len_cached`."""
    assert kind in rope.ROPE_INIT_FUNCTIONS
    how: dict[str, object] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        how |= {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
        how["original_max_position_embeddings"] = 64
    model = tiny(rope_parameters=how, max_position_embeddings=128)
    (module,) = (m for m in model.modules() if getattr(m, "rope_type", None) == kind)
    for name in ("inv_freq", "original_inv_freq", "max_seq_len_cached", "original_max_seq_len"):
        assert hasattr(module, name), name
