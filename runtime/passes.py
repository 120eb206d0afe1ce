"""The passes that a generation is made of: counted, and bounded in size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One run of the whole model: host seconds, and the tokens that went in."""

    seconds: float
    num_tokens: int


@contextmanager
def note_passes(network: Any) -> Iterator[list[Pass]]:
    """Every pass of `network` within the block, in order."""
    passes: list[Pass] = []
    begin_s = [0.0]

    def before(*_: Any) -> None:
        begin_s[0] = time.perf_counter()

    def after(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
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
