"""From how many rows on torch's means give each row the same bits, on a device.

torch sums a row up by as many threads as there are few rows for them: of one row of 576 numbers by
128, of sixteen and more by 32 each. The last bit of a mean, on which an RMSNorm stands, depends on
it: of few rows, so many are tried. From sixteen rows on it does not; passes of fewer are filled up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

# From the largest on: how many rows may be the least, and what that adds to what is tried.
_CANDIDATES = {64: (64, 100, 300), 16: (16, 17, 40), 4: range(4, 16), 1: range(1, 4)}
_TRIED_ROWS = 512


def least_rows(device: torch.device, widths: Sequence[int]) -> int:
    """The least number of rows from which means over any of the widths are equal to the bit."""
    return max(_least(device, width) for width in widths)


@functools.cache
def _least(device: torch.device, width: int) -> int:
    chance = torch.Generator(device).manual_seed(width)
    rows = torch.randn((_TRIED_ROWS, width), generator=chance, device=device).square()
    wanted = rows.mean(-1)
    least = max(_CANDIDATES)
    for candidate, counts in _CANDIDATES.items():
        if not all(torch.equal(_means(rows, count), wanted) for count in counts):
            break
        least = candidate
    return least


def _means(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Each row's mean, `count` rows at a time; the last ones among as many from further up."""
    pieces = [rows[begin : begin + count].mean(-1) for begin in range(0, len(rows) - count, count)]
    missing = len(rows) - sum(map(len, pieces))
    return torch.cat([*pieces, rows[-count:].mean(-1)[-missing:]])
