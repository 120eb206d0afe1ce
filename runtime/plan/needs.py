"""How much VRAM a run takes beside its weights, from the model's config and the asked context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from layerpack.formats.errors import PackError
from layerpack.formats.pack import Pack
from layerpack.formats.units import DTYPE_BYTES
from layerpack.runtime.plan.plan import Needs

PREFILL_TOKENS = 2048
"""Prompts are run in passes of at most so many tokens, which bounds the activations."""
_HIDDEN_COPIES, _INNER_COPIES, _LOGIT_BYTES = 6, 3, 4

Config = Mapping[str, Any]
"""Fields of a config.json, of the text model where there are several."""


def estimate_needs(
    pack: Pack,
    *,
    context_tokens: int,
    kv_tokens: int | None = None,
    pass_tokens: int | None = None,
    proposed_tokens: int = 0,
) -> Needs:
    """Upper estimates, from config.json alone (transformers is not imported).

    `context_tokens` is the longest sequence, `kv_tokens` all of them together (None: there is one).

    `pass_tokens` is the most tokens of one pass (default: the context, up to a prefill pass);
    `proposed_tokens` of them, by a draft, need logits beside the last one, and room in the KV cache
    beside the context. Raises PackError.
    """
    text = _text_config(pack)
    width = DTYPE_BYTES[pack.manifest.model.dtype]
    kv_tokens = kv_tokens or context_tokens
    tokens = pass_tokens or min(kv_tokens, PREFILL_TOKENS)
    hidden, heads, _, head_dim = _heads(text)
    quantised = [state.shape for blob in pack.manifest.layers for state in blob.nf4.values()]
    inner = max(
        (rows for blob in pack.manifest.layers for rows, _ in blob.matrices), default=hidden
    )
    activation = tokens * width * (_HIDDEN_COPIES * hidden + _INNER_COPIES * inner)
    # Attention over the cache makes one contiguous copy of a layer's keys and values for all heads.
    activation += 2 * heads * head_dim * width * context_tokens
    activation += (
        _number(text, "vocab_size") * _LOGIT_BYTES * (kv_tokens // context_tokens + proposed_tokens)
    )
    decode = max((shape[0] * shape[1] * width for shape in quantised), default=0)
    head = pack.manifest.head
    constants = sum(
        entry.length_bytes for entry in head.tensors if entry.name != pack.manifest.model.head
    )
    return Needs(
        cache_bytes=cache_bytes(
            text,
            num_layers=pack.manifest.model.num_layers,
            element_bytes=width,
            context_tokens=kv_tokens + proposed_tokens,
        ),
        activation_bytes=activation,
        decode_bytes=decode,
        constant_bytes=constants,
    )


def cache_bytes(config: Config, *, num_layers: int, element_bytes: int, context_tokens: int) -> int:
    """Bytes of the KV cache of a whole context."""
    _, _, kv_heads, head_dim = _heads(config)
    return 2 * num_layers * kv_heads * head_dim * element_bytes * context_tokens


def context_limit(pack: Pack) -> int | None:
    """The most tokens, prompt included, that the model takes; None if not stated.

    Scaled rotary positions (YaRN and others, as model pages tell users to switch them on) reach
    `factor` times as far as those that the model was trained with.
    """
    text = _text_config(pack)
    trained = _number(text, "max_position_embeddings", "n_positions")
    scaled = [
        int(_number(rope, "original_max_position_embeddings", default=trained) * factor)
        for rope in _rope_scalings(text)
        if isinstance(factor := rope.get("factor"), (int, float)) and math.isfinite(factor)
    ]
    return max([trained, *scaled]) or None


def _rope_scalings(config: Config) -> list[Config]:
    """The scalings of a config: one, or one for each kind of layer."""
    found = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(found, dict):
        return []
    return [found, *(part for part in found.values() if isinstance(part, dict))]


def _heads(config: Config) -> tuple[int, int, int, int]:
    """(hidden size, heads, heads of keys and values, size of a head)."""
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    heads = _number(config, "num_attention_heads", "n_head")
    kv_heads = _number(config, "num_key_value_heads", default=heads)
    return hidden, heads, kv_heads, _number(config, "head_dim", default=hidden // max(heads, 1))


def _text_config(pack: Pack) -> Config:
    config = pack.json_object("config.json")
    if not isinstance(config.get("model_type"), str):
        raise PackError(f'{pack.path / "config.json"}: no "model_type" in it; convert again')
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _number(config: Config, *names: str, default: int = 0) -> int:
    for name in names:
        if type(config.get(name)) is int:
            return int(config[name])
    return default
