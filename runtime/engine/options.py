"""What a generation may be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from layerpack.formats.errors import OptionError
from layerpack.runtime.core.checked import is_number, require_whole

MOST_DRAFT_TOKENS = 256
"""Tokens proposed per pass by a draft, as a tree, where so many are free.

A pass that streams its weights costs what one of a single token does, so only the draft's own time
counts, until computing takes longer than the weights.
"""
LOOKUP_TOKENS = 8
"""Tokens tried per pass that the text so far suggests, where trying them costs nothing."""
SEEDS = 1 << 64
_MOST_PENALTY, _MOST_LOGPROBS = 2.0, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """`temperature` 0 is greedy decoding; `top_p`, `top_k`, `min_p`, `seed` matter above it only.

    A seed gives the same text each time, whatever proposes tokens; None draws one. What the pack's
    generation_config.json says of sampling and penalties is not applied, only its end tokens. `raw`
    sends a text as it is, without the chat template; `system` is a system message put before it,
    `template_arguments` go to the template (`{"enable_thinking": False}`).

    `draft_tokens` are proposed per pass by the model's draft, if it has one (0 leaves it out; None:
    as many as cost nothing, in trees as deep as measured times say);
    `prompt_lookup_tokens` per pass from repetitions of the text so far, beside the draft's or alone
    (None: a few where a GPU waits for weights anyway; `look_up` False: none). Both change how many
    tokens a pass gives, never which.

    The text ends before the first of the `stop` strings. Of tokens said before, `presence_penalty`
    is taken off the logits once, `frequency_penalty` for each time, and the prompt's, too, are
    divided by `repetition_penalty` (multiplied below 0). `top_logprobs`: log-probabilities of each
    token, and of so many others, as the model has them before any of this; None: none.

    Raises OptionError for values that mean nothing.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    raw: bool = False
    system: str | None = None
    template_arguments: dict[str, object] | None = None
    draft_tokens: int | None = None
    prompt_lookup_tokens: int | None = None
    look_up: bool = True
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    top_logprobs: int | None = None

    @property
    def penalises(self) -> bool:
        """Whether what was said changes what will be."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    def lookup_tokens(self, *, rows_are_free: bool) -> int:
        """How many a pass tries, where more tokens in it cost nothing or something."""
        if not self.look_up:
            return 0
        return self.prompt_lookup_tokens or (LOOKUP_TOKENS if rows_are_free else 0)

    def __post_init__(self) -> None:
        require_whole("max_new_tokens", self.max_new_tokens, 1)
        require_whole("top_k", self.top_k, 0)
        if self.draft_tokens is not None:
            require_whole("draft_tokens", self.draft_tokens, 0)
        if self.prompt_lookup_tokens is not None:
            require_whole("prompt_lookup_tokens", self.prompt_lookup_tokens, 1)
        if self.seed is not None:
            require_whole("seed", self.seed, 0, SEEDS - 1)
        if not is_number(self.temperature) or self.temperature < 0:
            raise OptionError(f"temperature {self.temperature!r}: give a number from 0 on")
        if isinstance(self.stop, str) or not all(isinstance(t, str) and t for t in self.stop):
            raise OptionError(f"stop {self.stop!r}: give strings with something in them")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not is_number(value) or not -_MOST_PENALTY <= value <= _MOST_PENALTY:
                raise OptionError(f"{name} {value!r}: give a number from -2 to 2")
        if not is_number(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise OptionError(f"repetition_penalty {self.repetition_penalty!r}: give one above 0")
        if self.top_logprobs is not None:
            require_whole("top_logprobs", self.top_logprobs, 0, _MOST_LOGPROBS)
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise OptionError(f"top_p {self.top_p!r}: give a number above 0 and up to 1")
        if not is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise OptionError(f"min_p {self.min_p!r}: give a number from 0 to 1")
