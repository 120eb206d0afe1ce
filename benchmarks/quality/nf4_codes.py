"""Codes and scales of plain bitsandbytes NF4, found in other ways than bitsandbytes does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch

BLOCK, NESTED_BLOCK, AT_ONCE = 64, 256, 128
RATIOS = tuple(torch.linspace(0.75, 1.1, 15).tolist())
"""Of a block's largest weight: the scales that are tried."""


class Codes:
    """NF4's sixteen values, and the nearest of them."""

    def __init__(self, device: torch.device) -> None:
        self.values = bnb.get_4bit_type("nf4", device=device).float()
        self._middles = (self.values[1:] + self.values[:-1]) / 2

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest of the sixteen to each value."""
        found: torch.Tensor = self.values[torch.bucketize(values, self._middles)]
        return found


def plain(weight: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' own, as packs store weights: through NF4 and back, in the same dtype."""
    codes, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
    )
    found: torch.Tensor = bnb.dequantize_4bit(codes, state).view_as(weight)
    return found


def searched(
    weight: torch.Tensor,
    importance: torch.Tensor,
    codes: Codes,
    *,
    signs: tuple[int, ...],
    ratios: Sequence[float] = RATIOS,
    steps: int = 2,
) -> torch.Tensor:
    """Scales (out, blocks) of the least error weighed by `importance` (in,)."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    weighed = importance.float().unflatten(0, (-1, BLOCK))[None]
    most = blocks.abs().amax(-1)
    most = torch.where(most == 0, 1.0, most)
    best, least = most.clone(), torch.full_like(most, torch.inf)
    for ratio in [sign * ratio for ratio in ratios for sign in signs]:
        scales = most * ratio
        for _ in range(steps):  # then with the best scale for these codes
            found = codes.nearest(blocks / scales[..., None])
            error = (weighed * (blocks - found * scales[..., None]) ** 2).sum(-1)
            is_better = error < least
            best, least = torch.where(is_better, scales, best), torch.minimum(error, least)
            norm = (weighed * found**2).sum(-1)
            scales = torch.where(norm > 0, (weighed * found * blocks).sum(-1) / norm, scales)
            scales = torch.where(scales == 0, most, scales)
    return best


def nested(scales: torch.Tensor) -> torch.Tensor:
    """Scales as double quantisation stores them."""
    offset = scales.mean()
    stored, state = bnb.quantize_blockwise(
        (scales - offset).flatten().contiguous(), blocksize=NESTED_BLOCK
    )
    found = bnb.dequantize_blockwise(stored, state).view_as(scales) + offset
    return torch.where(found == 0, scales, found)


def rounded(weight: torch.Tensor, scales: torch.Tensor, codes: Codes) -> torch.Tensor:
    """The code of each weight with scales as they are stored."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    return codes.nearest(blocks / scales[..., None]).flatten(1)


def decoded(found: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Weights of codes and scales."""
    weight: torch.Tensor = (found.unflatten(1, (-1, BLOCK)) * scales[..., None]).flatten(1)
    return weight.bfloat16()


def stretched(
    weight: torch.Tensor, found: torch.Tensor, scales: torch.Tensor, squares: torch.Tensor
) -> torch.Tensor:
    """Scales with which what a row gives is no longer too small where it ought to be large.

    `squares`: the inputs' X^T X (in, in), or its diagonal where errors are not put right.
    """
    aimed = weight.float() * squares if squares.dim() == 1 else weight.float() @ squares
    gain = (aimed * weight.float()).sum(1) / (aimed * decoded(found, scales).float()).sum(1)
    return scales * gain[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensation:
    """How errors are put right: with so much of the mean square added to the diagonal.

    `within`: only among so many columns: those `beside` each other, those that follow each other
    when `sorted` by the inputs' sizes, or `dealt` out so that each group has of all sizes. `rank`:
    by so many directions that the inputs share, apart from each column's own square. Either needs
    less of X^T X.
    """

    damp: float
    within: int | None = None
    together: str = "beside"
    rank: int | None = None

    def hessian(self, squares: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """X^T X (in, in) as it is used, in float64, columns in `order`."""
        found = squares[order][:, order].double()
        if self.within is not None:
            place = torch.arange(len(order), device=order.device)
            number = -(-len(order) // self.within)
            group = {
                "beside": order // self.within,
                "sorted": place // self.within,
                "dealt": place % number,
            }[self.together]
            found = torch.where(group[:, None] == group, found, 0)
        if self.rank is not None:
            most, ways = torch.linalg.eigh(found)
            most, ways = most[-self.rank :].clamp(min=0), ways[:, -self.rank :]
            shared = (ways * most) @ ways.T
            own = (found.diagonal() - shared.diagonal()).clamp(min=0)
            found = shared + torch.diag(own)
        found.diagonal().add_(self.damp * found.diagonal().mean())
        dead = found.diagonal() == 0
        found.diagonal()[dead] = 1
        return found


def compensated(
    weight: torch.Tensor,
    scales: torch.Tensor,
    squares: torch.Tensor,
    how: Compensation,
    codes: Codes,
) -> torch.Tensor:
    """The codes of GPTQ with scales that stand; `squares` (in, in) are the inputs' X^T X."""
    order = squares.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(how.hessian(squares, order))), upper=True
    )
    upper = upper.float().contiguous()
    left = weight.float()[:, order].contiguous()
    by_column = scales[:, order // BLOCK].contiguous()
    found = torch.empty_like(left)
    for begin in range(0, left.shape[1], AT_ONCE):
        end = min(begin + AT_ONCE, left.shape[1])
        columns = slice(begin, end)
        found[:, columns], errors = one_block(
            left[:, columns], by_column[:, columns], upper[columns, columns], codes
        )
        left[:, end:] -= errors @ upper[columns, end:]
    in_place = torch.empty_like(found)
    in_place[:, order] = found
    return in_place


def one_block(
    left: torch.Tensor, scales: torch.Tensor, upper: torch.Tensor, codes: Codes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors (out, columns) of some columns, each error put right in those after it."""
    left = left.clone()
    found, errors = torch.empty_like(left), torch.empty_like(left)
    for column in range(left.shape[1]):
        scale, value = scales[:, column], left[:, column]
        found[:, column] = codes.nearest(value / scale)
        put = (found[:, column] * scale).bfloat16().float()
        error = (value - put) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:]
        errors[:, column] = error
    return found, errors
