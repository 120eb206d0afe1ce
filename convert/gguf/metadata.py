"""A GGUF file's metadata to the fields of a config.json: every key is carried, neutral, or refused.

transformers reads the sizes of a model and leaves the rest: how its positions are scaled, caps,
windows. Here each key of the architecture has to be taken by somebody; what nobody takes might
change what the model computes, so the file is refused. The keys are those that llama.cpp's
converter writes; what its runtime knows without a key is noted where it is used.
Source: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py and src/llama-model.cpp.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from layerpack.convert.gguf.rope import rope_parameters
from layerpack.convert.gguf.stated import Stated
from layerpack.formats.errors import UnsupportedError

ARCHITECTURES = frozenset(
    {
        "bloom",
        "gemma2",
        "gemma3",
        "llama",
        "mistral",
        "nemotron",
        "phi3",
        "qwen2",
        "qwen3",
        "starcoder2",
        "stablelm",
    }
)
"""Dense models whose keys are all known here."""
_WINDOWED = ("gemma2", "gemma3", "mistral", "phi3")
_PARTLY_ROTATED = ("nemotron", "phi3", "stablelm")
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def config_fields(
    metadata: Mapping[str, Any],
    carried: Mapping[str, Any],
    carried_keys: frozenset[str],
    tensors: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    where: str,
) -> dict[str, Any]:
    """Fields of config.json.

    `carried` are those that transformers read, from `carried_keys`; `defaults` what its config
    class has. `tensors` are arrays by name, of which those about positions are looked into.
    Raises UnsupportedError by the key.
    """
    architecture = str(metadata["general.architecture"])
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{where}: layerpack does not know all that a GGUF file says of the architecture "
            f"{architecture}; convert the 16-bit checkpoint instead"
        )
    stated, fields = Stated(metadata, architecture), dict(carried)
    for key in carried_keys - {"rope.freq_base", "rope.dimension_count", "attention.key_length"}:
        stated.take(key)
    fields.pop("rope_theta", None)
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        # A config class' own would be tokens of another vocabulary.
        fields[f"{role}_token_id"] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    head_dim = _head_dim(stated, fields, defaults, where)
    _take_epsilon(stated, fields, defaults)
    _take_window(stated, fields)
    _take_gemmas(stated, fields, head_dim)
    _take_biases(fields, tensors, defaults)
    if architecture == "stablelm":
        stated.take("use_parallel_residual")  # transformers tells by the tensors
        fields["qk_layernorm"] = "blk.0.attn_q_norm.weight" in tensors
    if "rope_parameters" in defaults:
        fields |= rope_parameters(
            stated,
            tensors,
            head_dim=head_dim,
            partly=architecture in _PARTLY_ROTATED,
            max_tokens=int(fields.get("max_position_embeddings", 0)),
            where=where,
        )
    if stated.take("attention.scale", head_dim**-0.5) != head_dim**-0.5:
        raise UnsupportedError(f"{where}: states its own attention.scale, which is not supported")
    for key, value in stated.left().items():
        raise UnsupportedError(
            f"{where}: states {architecture}.{key} = {value!r}, of which layerpack does not know "
            "what it changes; convert the 16-bit checkpoint instead"
        )
    return fields


def _head_dim(
    stated: Stated, fields: dict[str, Any], defaults: Mapping[str, Any], where: str
) -> int:
    heads = fields.get("num_attention_heads", fields.get("n_head"))
    usual = int(fields["hidden_size"]) // int(heads or 1)
    head_dim = int(stated.take("attention.key_length", usual))
    if stated.take("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{where}: its keys and values have different lengths")
    if "head_dim" in defaults:
        fields["head_dim"] = head_dim
    elif head_dim != usual:
        raise UnsupportedError(
            f"{where}: heads of {head_dim} where {fields['model_type']} has {usual}"
        )
    return head_dim


def _take_epsilon(stated: Stated, fields: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    for key in ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"):
        value = stated.take(key)
        for name in ("norm_eps", "norm_epsilon", "layer_norm_eps"):
            if value is not None and name in defaults:
                fields[name] = value


def _take_window(stated: Stated, fields: dict[str, Any]) -> None:
    if stated.architecture in _WINDOWED:
        # Without the key there is none, whatever a config class has by itself.
        window = stated.take("attention.sliding_window", fields.get("sliding_window"))
        fields["sliding_window"] = window or None


def _take_gemmas(stated: Stated, fields: dict[str, Any], head_dim: int) -> None:
    architecture = stated.architecture
    if architecture not in _GEMMA_27B_LAYERS:
        return
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = stated.take(name)
        if value is not None:
            fields[name] = value or None
    # No key tells: llama.cpp knows the largest ones by their number of layers.
    if fields["num_hidden_layers"] == _GEMMA_27B_LAYERS[architecture]:
        fields["query_pre_attn_scalar"] = fields["hidden_size"] // fields["num_attention_heads"]
    else:
        fields["query_pre_attn_scalar"] = head_dim
    pattern = stated.take("attention.sliding_window_pattern")
    if pattern is not None:
        count = fields["num_hidden_layers"]
        slides = pattern if isinstance(pattern, list) else [(i + 1) % pattern for i in range(count)]
        fields["layer_types"] = [
            "sliding_attention" if slide else "full_attention" for slide in slides
        ]


def _take_biases(
    fields: dict[str, Any], tensors: Collection[str], defaults: Mapping[str, Any]
) -> None:
    """What is there says it; a bias without a place would be refused later, by its name."""
    for name, module in (("attention_bias", "attn_"), ("mlp_bias", "ffn_"), ("use_bias", "ffn_")):
        if name in defaults:
            fields[name] = any(
                tensor.startswith(f"blk.0.{module}")
                and tensor.endswith(".bias")
                and "norm" not in tensor
                for tensor in tensors
            )
