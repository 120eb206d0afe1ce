"""How much context to set memory aside for: what a run can need; the rest is the weights'.

Only a tokenizer knows how many tokens a prompt has, and it comes with transformers: seconds of
importing, in which weights could be loaded already. So a short prompt is bounded without one.
"""

from __future__ import annotations

from layerpack.formats.pack import Pack
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.prompt import encode_prompt, most_tokens
from layerpack.runtime.plan.needs import context_limit
from layerpack.runtime.tokenizer import load_tokenizer


def tokens_needed(pack: Pack, prompt: str, options: GenerateOptions) -> int:
    """Tokens of prompt and answer, or a bound for them. Raises PackError, PromptError."""
    prompt_tokens = most_tokens(prompt, options)
    if prompt_tokens is None:
        prompt_tokens = len(encode_prompt(load_tokenizer(pack.path), prompt, options))
    whole = prompt_tokens + options.max_new_tokens
    limit = context_limit(pack)
    return whole if limit is None else min(whole, limit)
