"""How much VRAM a run takes beside its weights, from the model's config and the asked context."""

from __future__ import annotations

from typing import Any

from layerpack.formats.errors import PackError
from layerpack.formats.pack import Pack
from layerpack.formats.units import DTYPE_BYTES
from layerpack.runtime.plan.plan import Needs

PREFILL_TOKENS = 2048
"""Prompts are run in passes of at most so many tokens, which bounds the activations."""
_HIDDEN_COPIES, _INNER_COPIES, _LOGIT_BYTES = 8, 3, 10


def estimate_needs(
    pack: Pack,
    *,
    context_tokens: int,
    pass_tokens: int | None = None,
    proposed_tokens: int = 0,
) -> Needs:
    """Upper estimates for batch size 1, from config.json alone (transformers is not imported).

    `pass_tokens` is the most tokens of one pass (default: the context, up to a prefill pass);
    `proposed_tokens` of them, by a draft, need logits beside the last one. Raises PackError.
    """
    text = _text_config(pack)
    width = DTYPE_BYTES[pack.manifest.model.dtype]
    tokens = pass_tokens or min(context_tokens, PREFILL_TOKENS)
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    heads = _number(text, "num_attention_heads", "n_head")
    kv_heads = _number(text, "num_key_value_heads", default=heads)
    head_dim = _number(text, "head_dim", default=hidden // max(heads, 1))
    layers = pack.manifest.model.num_layers
    cache = 2 * layers * kv_heads * head_dim * width * context_tokens
    shapes = [state.shape for blob in pack.manifest.layers for state in blob.nf4.values()]
    inner = max((shape[0] for shape in shapes), default=hidden)
    activation = tokens * width * (_HIDDEN_COPIES * hidden + _INNER_COPIES * inner)
    # Attention over the cache makes one contiguous copy of a layer's keys and values for all heads.
    activation += 2 * heads * head_dim * width * context_tokens
    activation += _number(text, "vocab_size") * _LOGIT_BYTES * (1 + proposed_tokens)
    decode = max((shape[0] * shape[1] * width for shape in shapes), default=0)
    head = pack.manifest.head
    constants = sum(
        entry.length_bytes for entry in head.tensors if entry.name != pack.manifest.model.head
    )
    return Needs(
        cache_bytes=cache,
        activation_bytes=activation,
        decode_bytes=decode,
        constant_bytes=constants,
    )


def context_limit(pack: Pack) -> int | None:
    """The most tokens, prompt included, that the model was made for; None if not stated."""
    return _number(_text_config(pack), "max_position_embeddings", "n_positions") or None


def _text_config(pack: Pack) -> dict[str, Any]:
    config = pack.json_object("config.json")
    if not isinstance(config.get("model_type"), str):
        raise PackError(f'{pack.path / "config.json"}: no "model_type" in it; convert again')
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _number(config: dict[str, Any], *names: str, default: int = 0) -> int:
    for name in names:
        if type(config.get(name)) is int:
            return int(config[name])
    return default
