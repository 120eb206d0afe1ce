"""The token of a position, from its logits, a seed, and the position alone.

Sampling is the argmax of the filtered scores plus Gumbel noise, which draws from their softmax.
The noise is keyed by seed and position: a pass that checks many tokens draws what as many passes
of one would, and a draft given the same noise proposes what will be drawn.
Source: the Gumbel-max trick, as in Maddison et al., A* Sampling, https://arxiv.org/abs/1411.0030.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerpack.runtime.engine.options import GenerateOptions

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_LEAST_TEMPERATURE = 1e-30  # logits over less than that are infinite


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token of the text; where asked for, with its log-probability and the likeliest others'."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """`choose(place, ahead)`: the model's own token behind a node, one after the other."""

    def __init__(
        self,
        sampler: Sampler,
        options: GenerateOptions,
        logits: torch.Tensor,
        best: Sequence[int],
        ids: Sequence[int],
        prompt_tokens: int,
    ) -> None:
        self._sampler, self._options = sampler, options
        self._logits, self._best = logits, best
        self._ids, self._prompt_tokens = ids, prompt_tokens
        self.tokens: list[Token] = []

    def __call__(self, place: int, ahead: int) -> int:
        """Waits for the device, unless the likeliest token is asked for alone."""
        options, row = self._options, self._logits[place + 1 : place + 2]
        if self._sampler.seed is None and not options.penalises:
            token = self._best[place + 1]
        else:
            if options.penalises:
                said = [token.id for token in self.tokens]
                row = penalised(row, [*self._ids, *said], self._prompt_tokens, options)
            token = int(self._sampler.scores(row, [len(self._ids) + ahead]).argmax())
        logprob, top = None, list[tuple[int, float]]()
        if options.top_logprobs is not None:
            probable = self._logits[place + 1].float().log_softmax(-1)
            logprob = float(probable[token])
            found = probable.topk(options.top_logprobs)
            top = list(zip(found.indices.tolist(), found.values.tolist(), strict=True))
        self.tokens.append(Token(id=token, logprob=logprob, top=tuple(top)))
        return token


def penalised(
    logits: torch.Tensor, ids: Sequence[int], prompt_tokens: int, options: GenerateOptions
) -> torch.Tensor:
    """Logits (1, vocabulary), float32, with the options' penalties for what was said in `ids`.

    Sources: OpenAI's API for presence and frequency, which look at the answer alone; Keskar et al.,
    CTRL, https://arxiv.org/abs/1909.05858, for repetition, which looks at the prompt as well.
    """
    logits = logits.float().clone()
    everything = torch.tensor(list(set(ids)), dtype=torch.int64, device=logits.device)
    seen = logits[0, everything]
    penalty = options.repetition_penalty
    logits[0, everything] = torch.where(seen > 0, seen / penalty, seen * penalty)
    counts = Counter(ids[prompt_tokens:])
    if counts:
        tokens = torch.tensor(list(counts), dtype=torch.int64, device=logits.device)
        times = torch.tensor(list(counts.values()), dtype=torch.float32, device=logits.device)
        logits[0, tokens] -= options.presence_penalty + options.frequency_penalty * times
    return logits


class Sampler:
    """`seed` is what was asked for, or drawn; None where nothing is random."""

    def __init__(self, options: GenerateOptions) -> None:
        self._options = options
        self.seed: int | None = None
        self._filters: list[Any] = []
        if options.temperature > 0:
            self.seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
            self._filters = _filters(options)

    def scores(self, logits: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """Of each row's logits (rows, vocabulary), for a token at its position, float32.

        The highest one is the token. Where nothing is random these are the logits.
        """
        scores = logits.float()
        if self.seed is None:
            return scores
        for one in self._filters:
            scores = one(None, scores)
        return scores + self._noise(positions, logits.shape[-1], scores.device)

    def chooser(
        self, logits: torch.Tensor, best: Sequence[int], ids: Sequence[int], prompt_tokens: int
    ) -> Chooser:
        """Of logits (1 + nodes, vocabulary) behind `ids` and at a tree's nodes, for `tree.follow`.

        `best` are the likeliest tokens of these rows.
        """
        return Chooser(self, self._options, logits, best, ids, prompt_tokens)

    def _noise(self, positions: Sequence[int], count: int, device: torch.device) -> torch.Tensor:
        """Gumbel's distribution (positions, count), keyed by seed and position."""
        key_of = {
            position: hashlib.blake2b(f"{self.seed} {position}".encode(), digest_size=8).digest()
            for position in positions
        }
        drawn = {
            position: gumbel(int.from_bytes(key, "little", signed=True), count, device)
            for position, key in key_of.items()
        }
        return torch.stack([drawn[position] for position in positions])


def gumbel(key: int, count: int, device: torch.device) -> torch.Tensor:
    """`count` values of Gumbel's distribution, float32, made on `device` from a 64-bit key.

    Value n is a function of the key and n: SplitMix64's output for its nth state, of which 52 bits
    make a float64. Source: Steele et al., Fast splittable pseudorandom number generators,
    https://doi.org/10.1145/2714064.2660195.
    """
    state = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    state.mul_(_GAMMA).add_(key)  # int64 wraps, as the method wants it
    for shift, factor in ((30, _FACTORS[0]), (27, _FACTORS[1])):
        state.bitwise_xor_(_shifted(state, shift)).mul_(factor)
    state.bitwise_xor_(_shifted(state, 31))
    uniform = _shifted(state, 12).double().add_(0.5).mul_(2.0**-52)  # below 1, exactly
    return uniform.log_().neg_().log_().neg_().float()


def _shifted(state: torch.Tensor, count: int) -> torch.Tensor:
    """To the right, zeros coming in."""
    return (state >> count).bitwise_and_((1 << (64 - count)) - 1)


def _filters(options: GenerateOptions) -> list[Any]:
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    filters: list[Any] = [TemperatureLogitsWarper(max(options.temperature, _LEAST_TEMPERATURE))]
    if options.top_k:
        filters.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        filters.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        filters.append(MinPLogitsWarper(options.min_p))
    return filters
