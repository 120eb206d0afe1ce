"""Codes of bfloat16 weights from their bits alone: one look-up an element, no arithmetic on floats.

What a weight becomes once it is scaled, w * (1 / absmax), depends on its sign, on both mantissas of
7 bits, and on how far the exponents are apart: powers of two scale without rounding. So the codes
of every possible pair fit into a table, which the general way fills.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

_MANTISSAS = 128
_ROW_BITS = 16
_LEAST_EXPONENT, _LARGEST_EXPONENT = 8, 251
"""Of an absmax, as stored: outside, a weight or the reciprocal could be a subnormal number."""
_FAR = 6 * _MANTISSAS
"""So far below absmax (a factor of 32), every weight has the code of zero."""
_ZERO_CODE = 7

Search = Callable[[torch.Tensor], torch.Tensor]


def bfloat16_codes(
    blocks: torch.Tensor, search: Search
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes (uint8, flat) and absmax (float32) of whole blocks, one a row; on a CPU.

    None if they need the general way: a block of zeros, NaN, infinity, or extreme values. `search`
    gives the codes of scaled values, float32 in [-1, 1].
    """
    bits = blocks.view(torch.int16)
    largest = (bits & 0x7FFF).amax(1)  # as integers, positive floats have the order they have
    exponents = largest & 0x7F80
    least, most = torch.aminmax(exponents)
    if least < _LEAST_EXPONENT * _MANTISSAS or most > _LARGEST_EXPONENT * _MANTISSAS:
        return None
    rows = ((largest & 0x7F).to(torch.int32) << _ROW_BITS) + (1 << (_ROW_BITS - 1))
    # The subtraction may wrap around; signs and distances then still have places of their own.
    places = (bits - exponents[:, None]).to(torch.int32).add_(rows[:, None])
    codes = _table(search).index_select(0, places.view(-1))
    return codes, largest.view(torch.bfloat16).float()


@cache
def _table(search: Search) -> torch.Tensor:
    """A row for each mantissa of absmax; in it, a place for each wrapped difference of bits."""
    one = 127 * _MANTISSAS  # the bits of 1.0
    table = torch.full((_MANTISSAS, 1 << _ROW_BITS), _ZERO_CODE, dtype=torch.uint8)
    absmax = torch.arange(one, one + _MANTISSAS, dtype=torch.int16).view(torch.bfloat16).float()
    distances = torch.arange(-_FAR, _MANTISSAS)
    magnitudes = (one + distances).to(torch.int16).view(torch.bfloat16).float()
    scaled = (magnitudes[None, :] * absmax.reciprocal()[:, None]).clamp_(max=1)
    middle = 1 << (_ROW_BITS - 1)
    for sign, zero in ((1.0, middle), (-1.0, 0)):
        columns = (distances + zero) % (1 << _ROW_BITS)
        table[:, columns] = search((sign * scaled).view(-1)).view(scaled.shape)
    return table.view(-1)
