"""From how many rows on torch's means give each row the same bits, on a device.

torch sums a row up by as many threads as there are few rows for them: of one row of 576 numbers by
128, of sixteen and more by 32 each. The last bit of a mean, on which an RMSNorm stands, depends on
it. From a few rows on it does not; passes of fewer are filled up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

_CANDIDATES, _COUNTS, _TRIED = (1, 4, 16, 64), (1, 2, 3, 5, 17, 40, 64, 300), 512


def least_rows(device: torch.device, widths: Sequence[int]) -> int:
    """The least number of rows from which means over any of the widths are equal to the bit."""
    return max(_least(device, width) for width in widths)


@functools.cache
def _least(device: torch.device, width: int) -> int:
    chance = torch.Generator(device).manual_seed(width)
    rows = torch.randn((_TRIED, width), generator=chance, device=device).square()
    wanted = rows.mean(-1)
    return next(
        (
            least
            for least in _CANDIDATES
            if all(
                torch.equal(rows[:count].mean(-1), wanted[:count])
                for count in {max(least, count) for count in _COUNTS}
            )
        ),
        _CANDIDATES[-1],
    )
