"""The ways to codes and scales that better_codes.py tries.

`plain` is what `layerpack convert` does. Of the others each block's scale is that of the least
squared error (`searched`), or of the least error weighed by the inputs' mean squares (`weighted`)
or by their roots (`rooted`), and may be negative unless it is `unsigned`. `compensated`: codes
column by column, the error of each put right in those after it (GPTQ, Frantar et al.,
https://arxiv.org/abs/2210.17323), the largest inputs first, over plain scales; `both`, and all that
have `within` or `rank`: over weighted ones; `in turn`: each layer sees what the quantised ones
before it give. `gain`: the least error shrinks what a layer gives; each row's scales are stretched
until it is no longer too small in the mean. `folded`: what is large goes from a layer's inputs into
its columns, by way of the norm or the rows before (SINQ, https://arxiv.org/abs/2509.22944).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nf4_codes import RATIOS, Compensation


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How codes and scales are found; `power` of the inputs' mean squares weighs the error.

    `fold`: so much of the size of a layer's inputs goes into its columns, out of the norm or the
    rows before. `ratios` and `steps`: what is tried for a scale. `of_plain`: inputs are those that
    a plain pack's layers get, not the 16-bit model's.
    """

    power: float | None = None
    signs: tuple[int, ...] = (1, -1)
    compensation: Compensation | None = None
    gain: bool = False
    in_turn: bool = False
    fold: float | None = None
    ratios: Sequence[float] = RATIOS
    steps: int = 2
    of_plain: bool = False


def _unsigned(*, damp: float = 0.1, **more: Any) -> Way:
    how = {name: more.pop(name) for name in ("within", "together", "rank") if name in more}
    return Way(power=1, signs=(1,), compensation=Compensation(damp=damp, **how), **more)


_LIGHT, _DAMPED = Compensation(damp=0.01), Compensation(damp=0.1)
WAYS = {
    "plain": None,
    "searched": Way(power=0),
    "weighted": Way(power=1),
    "compensated": Way(compensation=_LIGHT),
    "compensated, damped": Way(compensation=_DAMPED),
    "both": Way(power=1, compensation=_LIGHT),
    "in turn": Way(power=1, compensation=_LIGHT, in_turn=True),
    "searched, gain": Way(power=0, gain=True),
    "weighted, gain": Way(power=1, gain=True),
    "weighted, unsigned": Way(power=1, signs=(1,)),
    "weighted, unsigned, gain": Way(power=1, signs=(1,), gain=True),
    "rooted, gain": Way(power=0.5, gain=True),
    "both, damped, gain": Way(power=1, compensation=_DAMPED, gain=True),
    "both, damped": Way(power=1, compensation=_DAMPED),
    "unsigned": _unsigned(),
    "unsigned, gain": _unsigned(gain=True),
    "unsigned, damped 0.5": _unsigned(damp=0.5),
    "unsigned, rank 64": _unsigned(rank=64),
    "within 64": _unsigned(within=64),
    "within 512": _unsigned(within=512),
    "within 512, sorted": _unsigned(within=512, together="sorted"),
    "within 512, dealt": _unsigned(within=512, together="dealt"),
    "within 1024": _unsigned(within=1024),
    "within 1024, sorted": _unsigned(within=1024, together="sorted"),
    "within 1024, damped 0.3": _unsigned(within=1024, damp=0.3),
    "within 1024, of plain": _unsigned(within=1024, of_plain=True),
    "within 1024, five ratios": _unsigned(within=1024, ratios=(1.0, 0.95, 0.9, 0.85, 0.8), steps=1),
    "within 1024, three ratios": _unsigned(within=1024, ratios=(1.0, 0.9, 0.8), steps=1),
    "within 2048": _unsigned(within=2048),
    "folded 0.25": Way(fold=0.25),
    "folded 0.5": Way(fold=0.5),
    "folded 0.25, weighted": Way(fold=0.25, power=1),
}
