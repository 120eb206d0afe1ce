"""Double quantisation: the absmax values as 8-bit codes in blocks of 256, reproducibly.

bitsandbytes takes the offset as a float32 mean, which depends on the number of threads; here the
mean is exact. Given the offset, codes, absmax and map are those of bitsandbytes' CPU code: the
value of the map that is nearest to the centre of one of 65536 cells of [-1, 1] (zero blocks: 0).
Source of the map: 8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from functools import cache

import torch

from layerpack.formats.blob.nf4 import NESTED_BLOCK_SIZE

_CHUNK = 1 << 18  # elements: the scratch memory stays in a core's cache
_HALF_CELLS = 32767.5
_BITS_OF_2_23 = 0x4B000000
_SUM_BITS = 36  # room for 2**26 values below 2**36 in an int64; weights have fewer blocks


def nest_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Codes (uint8), absmax of the blocks (float32), and offset of finite float32 values >= 0."""
    offset = exact_mean(absmax)
    codes = torch.empty(absmax.numel(), dtype=torch.uint8)
    nested = torch.empty(-(-absmax.numel() // NESTED_BLOCK_SIZE), dtype=torch.float32)
    for begin in range(0, absmax.numel(), _CHUNK):
        centred = absmax[begin : begin + _CHUNK] - offset
        missing = -centred.numel() % NESTED_BLOCK_SIZE
        blocks = torch.nn.functional.pad(centred, (0, missing)).view(-1, NESTED_BLOCK_SIZE)
        largest = blocks.abs().amax(1)
        nested[begin // NESTED_BLOCK_SIZE :][: largest.numel()] = largest
        scaled = blocks.mul_(largest.reciprocal()[:, None]).clamp_(-1, 1).view(-1)
        # The order of these operations is bitsandbytes', and their rounding shows in the codes.
        cell = _floor(scaled.add_(1.0).mul_(_HALF_CELLS).add_(0.5).nan_to_num_(0.0))
        codes[begin : begin + _CHUNK] = _cell_codes().index_select(0, cell)[: centred.numel()]
    return codes, nested, offset


def exact_mean(values: torch.Tensor) -> float:
    """The mean of finite float32 values >= 0, rounded to float32.

    Summed as integers, in units of 2**-36 of the largest one's power of two: the order of the
    additions, and so threads and vector units, cannot change the result.
    """
    largest = float(values.max()) if values.numel() else 0.0
    if not largest:
        return 0.0
    shift = _SUM_BITS - math.frexp(largest)[1]
    total = 0
    for begin in range(0, values.numel(), _CHUNK):
        piece = values[begin : begin + _CHUNK].double().mul_(2.0**shift).round_()
        total += int(piece.to(torch.int64).sum())
    mean = float(Fraction(total, values.numel()) / Fraction(2) ** shift)
    return float(struct.unpack("<f", struct.pack("<f", mean))[0])


def _floor(values: torch.Tensor) -> torch.Tensor:
    """Values from 0 to 65536 as int32, rounded down, in place: `to` takes ten times as long."""
    # From 2**23 on a float32 counts in ones, so its low bits are the number.
    whole = values.floor_().add_(2.0**23).view(torch.int32)
    return whole.sub_(_BITS_OF_2_23)


@cache
def nested_map() -> torch.Tensor:
    """The 256 values, ascending: seven decades of either sign, 1 to 64 steps each, and 0, 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10 ** (exponent - 6) * ((edges[1:] + edges[:-1]) / 2.0)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _cell_codes() -> torch.Tensor:
    values = nested_map()
    centres = torch.arange(65536, dtype=torch.float32) / _HALF_CELLS - 1
    return torch.bucketize(centres, (values[1:] + values[:-1]) / 2).to(torch.uint8)
