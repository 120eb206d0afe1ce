"""What a generation may be asked for."""

from __future__ import annotations

from dataclasses import dataclass

DRAFT_TOKENS = 16
"""Tokens proposed per pass unless asked otherwise.

A pass that checks 16 tokens costs what a pass of one does, so only the draft's own time counts:
16 tokens of a 0.5B model take a fraction of a pass that streams tens of gigabytes. Further tokens
seldom pay: a draft that is right nine times in ten has all 16 right once in five. The number stays
constant, whatever the draft's confidence: a wrong proposal costs nothing but the draft's time.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """`temperature` 0 is greedy decoding; `top_p`, `top_k` and `seed` matter above it only.

    What the pack's generation_config.json says of sampling and penalties is not applied, only its
    end tokens. `raw` sends a text as it is, without the chat template; `system` is a system message
    put before it. `draft_tokens` are proposed per pass by the model's draft, if it has one (0
    leaves it out); `prompt_lookup_tokens` per pass from repetitions of the prompt. Both change how
    many tokens a pass gives, never which: `exact` checks them with plain decoding's own arithmetic.
    Without it they are checked all at once, which costs the device less, but rounding may choose
    otherwise between two tokens that are all but equally likely. Sampling is never `exact`: drawn
    otherwise, though with the same odds.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    raw: bool = False
    system: str | None = None
    draft_tokens: int = DRAFT_TOKENS
    prompt_lookup_tokens: int | None = None
    exact: bool = True
