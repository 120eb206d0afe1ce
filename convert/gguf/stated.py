"""The metadata of one architecture in a GGUF file, and what of it nobody took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_IRRELEVANT = frozenset(
    {
        "context_length",
        "feed_forward_length",
        "attention.head_count_kv",
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "vocab_size",
    }
)
"""Sizes that follow from the others where transformers does not carry them, and remarks."""
_NEUTRAL: dict[str, float] = {
    "attention.causal": 1,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "residual_scale": 1,
}
"""Keys that change nothing at these values."""


class Stated:
    """The keys of one architecture, without its name; `take` each that is understood."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        prefix = f"{architecture}."
        self.architecture = architecture
        self._left = {
            key.removeprefix(prefix): value
            for key, value in metadata.items()
            if key.startswith(prefix)
        }

    def take(self, key: str, default: Any = None) -> Any:
        """Its value, or the default where the file has none."""
        return self._left.pop(key, default)

    def left(self) -> dict[str, Any]:
        """What nobody took, and is not neutral."""
        return {
            key: value
            for key, value in self._left.items()
            if key not in _IRRELEVANT and _NEUTRAL.get(key) != value
        }
