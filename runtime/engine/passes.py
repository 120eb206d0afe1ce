"""The passes that a generation is made of: counted, and bounded in size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from layerpack.runtime.trace.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One run of the whole model: host seconds, and the tokens that went in."""

    seconds: float
    num_tokens: int


class StepClock:
    """begun -pass-> logits ordered -tokens known-> begun again: one step of generation.

    A GPU is not done when the host has ordered a pass; it is when the host knows the tokens. What
    a draft does before a pass belongs to the step. A pass that gives no token, as the first ones
    of a long prompt, is a step that ends where the next pass begins.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._begin_s = time.perf_counter()
        self._passed = False
        self.proposing = False

    def pass_begins(self) -> None:
        """The host starts to order a pass."""
        now_s = time.perf_counter()
        if self._passed:
            self._end(now_s, 0)
        if self.proposing:
            self._trace.propose(self._begin_s, now_s)

    def pass_ends(self) -> None:
        """The host has ordered it."""
        self._passed = True

    def tokens_known(self, count: int) -> None:
        """The host has `count` new tokens."""
        self._end(time.perf_counter(), count)

    def _end(self, now_s: float, num_tokens: int) -> None:
        self._trace.step(self._begin_s, now_s, num_tokens)
        self._trace.clock.collect()
        self._begin_s = now_s
        self._passed = False


@contextmanager
def note_passes(network: Any, steps: StepClock) -> Iterator[list[Pass]]:
    """Every pass of `network` within the block, in order."""
    passes: list[Pass] = []
    begin_s = [0.0]

    def before(*_: Any) -> None:
        steps.pass_begins()
        begin_s[0] = time.perf_counter()

    def after(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        steps.pass_ends()
        passes.append(
            Pass(
                seconds=time.perf_counter() - begin_s[0],
                num_tokens=int(kwargs["input_ids"].shape[1]),
            )
        )

    hooks = [
        network.register_forward_pre_hook(before),
        network.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def count_proposed(passes: Sequence[Pass], prompt_tokens: int) -> tuple[int, int]:
    """(passes that gave tokens, tokens proposed in all).

    The first passes of a long prompt give none. Of the tokens that went in, the prompt and the
    last token of each pass before were known; the rest was proposed.
    """
    seen = decode_passes = 0
    for one in passes:
        seen += one.num_tokens
        decode_passes += seen >= prompt_tokens
    return decode_passes, max(0, seen - prompt_tokens - max(0, decode_passes - 1))


@contextmanager
def continued(network: Any) -> Iterator[None]:
    """Within the block the first pass takes the tokens that its cache lacks, though given all.

    Assisted generation begins with the whole sequence, whatever the cache holds.
    """

    def drop_known(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hook.remove()
        known = kwargs["past_key_values"].get_seq_length()
        kwargs = kwargs | {"input_ids": kwargs["input_ids"][:, known:]}
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = positions[..., known:]
        return args, kwargs

    hook = network.register_forward_pre_hook(drop_known, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()
