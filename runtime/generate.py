"""What came out of a prompt, and how it is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerpack.runtime.engine.sampling import Token
from layerpack.runtime.trace.steps import Pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What came out. `finish` is stop (an end token or string), length, or interrupted.

    `passes` counts runs of the model, prefill included; `pass_s` their mean, in seconds, a
    draft's time included; `first_pass_s` the first alone. `decode_passes` are those that gave
    tokens: all but the first ones of a long prompt. Of `proposed_tokens`, by a draft or prompt
    lookup, `accepted_tokens` were right. Of the prompt's tokens `cached_tokens` were known from
    other prompts. `seed` is what was sampled with; None for greedy decoding.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[Token, ...]
    prompt_tokens: int
    cached_tokens: int
    finish: str
    seed: int | None
    passes: int
    decode_passes: int
    proposed_tokens: int
    seconds: float
    first_pass_s: float
    peak_vram_bytes: int

    @property
    def pass_s(self) -> float:
        """Mean seconds of a pass."""
        return self.seconds / self.passes if self.passes else 0.0

    @property
    def accepted_tokens(self) -> int:
        """Proposed tokens that were right: each pass gives one token of its own beside them."""
        return max(0, len(self.token_ids) - self.decode_passes)

    @property
    def tokens_per_pass(self) -> float:
        """Mean number of tokens that a pass gave."""
        return len(self.token_ids) / self.decode_passes if self.decode_passes else 0.0


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
