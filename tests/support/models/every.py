"""A tiny random model of any type that the installed transformers knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.models.tiny import save_tokenizer

_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "decoder_ffn_dim"), 160
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth"), 3
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    "vocab_size": 300,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "tie_word_embeddings": False,
}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_GIVEN: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dots1": {"n_routed_experts": 8},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 0, "layer_types": None},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
    },
    "gpt_neo": {
        "num_layers": 2,
        "num_hidden_layers": 2,
        "attention_types": [[["global", "local"], 1]],
    },
    "gptj": {"rotary_dim": 8},
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "reformer": {"is_decoder": True},
    "siglip_vision_model": {"image_size": 28, "patch_size": 14},
    "clip_vision_model": {"image_size": 28, "patch_size": 14, "projection_dim": 64},
    "pixtral": {"image_size": 28, "patch_size": 14, "head_dim": 16},
    "idefics3_vision": {"image_size": 28, "patch_size": 14},
    "smolvlm_vision": {"image_size": 28, "patch_size": 14},
    "internvl_vision": {"image_size": [28, 28], "patch_size": [14, 14]},
    "qwen2_vl_vision": {"hidden_size": 64},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
    "qwen2_5_vl_vision": {"out_hidden_size": 64},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
    "qwen3_vl_vision": {"out_hidden_size": 64, "deepstack_visual_indexes": [1]},
    "qwen3_vl_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
    "exaone4_5_vision": {"out_hidden_size": 64, "fullatt_block_indexes": [1]},
}
"""What a type needs beside, as its makers' own fields depend on each other."""


def tiny_config(model_type: str, **fields: Any) -> Any:
    """A config of the type, small in all its parts. Raises what its class does."""
    from transformers import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[model_type], **fields)


def _small(kind: Any, **fields: Any) -> Any:
    given = _GIVEN.get(kind.model_type, {})
    known = kind(**{name: given[name] for name in kind.sub_configs if name in given}).to_dict()
    names = known.keys() | getattr(kind, "attribute_map", {}).keys()
    small = {name: value for name, value in _SMALL.items() if name in names}
    if known.get("sliding_window"):
        small["sliding_window"] = 8  # shorter than the prompt
    small |= given
    for part in kind.sub_configs.keys() - small.keys():
        if isinstance(known.get(part), dict) and known[part].get("model_type"):
            small[part] = _small_part(known[part]["model_type"], kind.sub_configs[part])
    return kind(**(small | fields))


def _small_part(model_type: str, kind: Any) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    known = model_type in CONFIG_MAPPING
    described: dict[str, Any] = _small(CONFIG_MAPPING[model_type] if known else kind).to_dict()
    return described


def save_random(path: Path, config: Any, *, seed: int = 0, multimodal: bool = False) -> Path:
    """Save a random bfloat16 model of the config, and a tokenizer, at `path`."""
    import transformers

    name = "AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM"
    torch.manual_seed(seed)
    model = getattr(transformers, name).from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The default 0.02 leaves logits so flat that a broken layer would hardly show.
            if parameter.ndim == 2:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path
