"""The token of a position, from its logits, a seed, and the position alone.

Sampling is the argmax of the filtered scores plus Gumbel noise, which draws from their softmax.
The noise is keyed by seed and position: a pass that checks many tokens draws what as many passes
of one would, and a draft given the same noise proposes what will be drawn.
Source: the Gumbel-max trick, as in Maddison et al., A* Sampling, https://arxiv.org/abs/1411.0030.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch

from layerpack.runtime.engine.options import GenerateOptions

_KEPT_POSITIONS = 32
_LEAST_TEMPERATURE = 1e-30  # logits over less than that are infinite


class Sampler:
    """`seed` is what was asked for, or drawn; None where nothing is random."""

    def __init__(self, options: GenerateOptions) -> None:
        self.seed: int | None = None
        self._filters: list[Any] = []
        self._drawn: dict[int, torch.Tensor] = {}  # a draft's, and the check's again
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
        noise = [self._noise(position, logits.shape[-1], scores.device) for position in positions]
        return scores + torch.stack(noise)

    def chooser(self, logits: torch.Tensor, first_position: int) -> Callable[[int, int], int]:
        """`choose(place, ahead)` for `tree.follow`, by logits (1 + nodes, vocabulary) of a tree.

        Waits for the device.
        """
        if self.seed is None:
            tokens = logits.argmax(-1).tolist()
            return lambda place, ahead: int(tokens[place + 1])

        def choose(place: int, ahead: int) -> int:
            row = logits[place + 1 : place + 2]
            return int(self.scores(row, [first_position + ahead]).argmax())

        return choose

    def _noise(self, position: int, count: int, device: torch.device) -> torch.Tensor:
        """`count` values of Gumbel's distribution: the same for every device, and for a while."""
        found = self._drawn.get(position)
        if found is None or len(found) != count or found.device != device:
            found = self._drawn[position] = self._draw(position, count).to(device)
            if len(self._drawn) > _KEPT_POSITIONS:
                del self._drawn[min(self._drawn)]
        return found

    def _draw(self, position: int, count: int) -> torch.Tensor:
        key = hashlib.blake2b(f"{self.seed} {position}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        return -torch.empty(count).exponential_(generator=generator).log_()


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
