"""Passes of any network, each timed from the ids to the token that they give."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from layerpack.runtime.core.patience import Patience
from layerpack.runtime.engine.sequence import PlainSequence


def time_passes(
    network: Any,
    *,
    context_tokens: int,
    passes: int,
    budget_s: float,
    patience: Patience,
    before_pass: Callable[[], None] | None = None,
) -> list[float]:
    """Seconds of each pass of one new token, after a prefill of `context_tokens` that warms up.

    At least one is timed; after `budget_s` no further one begins. Raises CancelledError.
    """
    vocabulary = network.config.get_text_config().vocab_size
    rng = random.Random(0)
    ids: list[int] = []

    def run(tokens: int) -> float:
        ids.extend(rng.randrange(vocabulary) for _ in range(tokens))
        begin_s = time.perf_counter()
        int(sequence.extend(ids)[-1].argmax())  # a user waits for the token
        return time.perf_counter() - begin_s

    context_tokens = max(1, context_tokens)
    most = context_tokens + passes
    with PlainSequence.opened(network, max_tokens=most, patience=patience) as sequence:
        run(context_tokens)
        begin_s = time.perf_counter()
        times_s: list[float] = []
        while len(times_s) < passes and (not times_s or time.perf_counter() - begin_s < budget_s):
            if before_pass is not None:
                before_pass()
            times_s.append(run(1))
    return times_s
