"""Passes of any network, each timed from the ids to the token that they give."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from layerpack.runtime.plan.needs import PREFILL_TOKENS


def time_passes(
    network: Any,
    *,
    device: torch.device,
    context_tokens: int,
    passes: int,
    budget_s: float,
    before_pass: Callable[[], None] | None = None,
) -> list[float]:
    """Seconds of each pass of one new token, after a prefill of `context_tokens` that warms up.

    At least one is timed; after `budget_s` no further one begins. Batch size 1.
    """
    from transformers.cache_utils import DynamicCache

    vocabulary = network.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def run(tokens: int) -> float:
        ids = torch.randint(vocabulary, (1, tokens), generator=generator).to(device)
        begin_s = time.perf_counter()
        out = network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        int(out.logits[0, -1].argmax())  # a user waits for the token
        return time.perf_counter() - begin_s

    with torch.inference_mode():
        cache = DynamicCache(config=network.config)
        for first in range(0, max(1, context_tokens), PREFILL_TOKENS):
            run(min(PREFILL_TOKENS, max(1, context_tokens) - first))
        begin_s = time.perf_counter()
        times_s: list[float] = []
        while len(times_s) < passes and (not times_s or time.perf_counter() - begin_s < budget_s):
            if before_pass is not None:
                before_pass()
            times_s.append(run(1))
    return times_s
