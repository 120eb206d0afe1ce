"""Bodies of requests as nobody would write them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = [
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "seed",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "presence_penalty",
    "logit_bias",
    "stream_options",
    "response_format",
    "chat_template_kwargs",
    "user",
    "max_completion_tokens",
    "best_of",
    "echo",
    "suffix",
]


def bodies(max_size: int) -> st.SearchStrategy[dict[str, Any]]:
    """JSON objects with fields that requests have, and values of any kind."""
    return st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=max_size)
