"""Scales and codes on a CPU, compiled when they are first needed. On_gpu.py does the same.

Both do the same float32 operations in the same order, none of them fused, so that a pack's bytes do
not depend on where it was made: each sum runs over columns in their order. What is done at once are
the rows of a tile, which know nothing of each other.
"""

from __future__ import annotations

import numba
import numpy as np

from layerpack.convert.gptq.ratios import RATIOS
from layerpack.formats.blob.nf4 import NF4_CODES

ROWS = 64
"""Of a tile: as many numbers as keep a core's vector unit busy."""
_STEP = 4  # columns that take off the errors of those before them together
_RATIOS = np.array(RATIOS, np.float32)
_CODES = np.array(NF4_CODES, np.float32)
_MIDDLES = (_CODES[1:] + _CODES[:-1]) / np.float32(2)
_ZERO, _ONE, _INFINITE = np.float32(0), np.float32(1), np.float32(np.inf)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def encode_tiles(  # type: ignore[no-untyped-def]
    weight, importance, order, feedback, block_size, codes, scales
) -> None:
    """Fill `codes` (rows, in) uint8, one each, and `scales` (rows, in / block_size) float32.

    `weight` (rows, in), `importance` (in,) and `feedback` (in, group) are float32, `order` (in,)
    is int32. `in` and `group` are multiples of `block_size` and of 4.
    """
    num_rows, num_columns = weight.shape
    num_blocks = num_columns // block_size
    tile = np.empty((num_columns, ROWS), np.float32)
    found = np.empty((num_columns, ROWS), np.uint8)
    steps = np.empty((num_blocks, ROWS), np.float32)
    for first in range(0, num_rows, ROWS):
        count = min(ROWS, num_rows - first)
        for row in range(ROWS):
            source = first + min(row, count - 1)
            for column in range(num_columns):
                tile[column, row] = weight[source, column]
        for block in range(num_blocks):
            begin = block * block_size
            _scales(
                tile[begin : begin + block_size],
                importance[begin : begin + block_size],
                steps[block],
            )
        _codes(tile, steps, order, feedback, block_size, found)
        for row in range(count):
            for column in range(num_columns):
                codes[first + row, column] = found[column, row]
            for block in range(num_blocks):
                scales[first + row, block] = steps[block, row]


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _scales(block, importance, best) -> None:  # type: ignore[no-untyped-def]  # noqa: PLR0912
    """`best` (rows,): of the scales tried for `block` (columns, rows), that of the least error.

    After each ratio of the largest weight, the scale of the least error for the codes found so.
    """
    most, least = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    scale, inverse = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    error, aimed, norm = (
        np.empty(ROWS, np.float32),
        np.empty(ROWS, np.float32),
        np.empty(ROWS, np.float32),
    )
    for row in range(ROWS):
        most[row] = _ZERO
        least[row] = _INFINITE
    for column in range(len(block)):
        for row in range(ROWS):
            most[row] = max(most[row], abs(block[column, row]))
    for row in range(ROWS):
        best[row] = most[row]
    for ratio in _RATIOS:
        for row in range(ROWS):
            scale[row] = most[row] * ratio
        for _ in range(2):
            for row in range(ROWS):
                inverse[row] = _ONE / scale[row] if scale[row] > _ZERO else _ZERO
                error[row] = _ZERO
                aimed[row] = _ZERO
                norm[row] = _ZERO
            for column in range(len(block)):
                weighed = importance[column]
                for row in range(ROWS):
                    value = block[column, row]
                    code = _nearest(value * inverse[row])
                    missing = value - code * scale[row]
                    error[row] += weighed * (missing * missing)
                    weighed_code = weighed * code
                    aimed[row] += weighed_code * value
                    norm[row] += weighed_code * code
            for row in range(ROWS):
                if error[row] < least[row]:
                    least[row] = error[row]
                    best[row] = scale[row]
                if aimed[row] > _ZERO:
                    scale[row] = aimed[row] / norm[row]


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _codes(tile, scales, order, feedback, block_size, found) -> None:  # type: ignore[no-untyped-def]
    """`found` (in, rows): codes, column by column, each error taken off in those behind it.

    Source: GPTQ, https://arxiv.org/abs/2210.17323; errors stay within a group of columns.
    """
    num_columns, group = feedback.shape
    errors = np.empty((group, ROWS), np.float32)
    first, second = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    third, fourth = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    for begin in range(0, num_columns, group):
        count = min(group, num_columns - begin)
        for at in range(0, count, _STEP):
            sources = order[begin + at : begin + at + _STEP]
            for row in range(ROWS):
                first[row] = tile[sources[0], row]
                second[row] = tile[sources[1], row]
                third[row] = tile[sources[2], row]
                fourth[row] = tile[sources[3], row]
            for before in range(at):
                share = feedback[begin + before]
                one, two, three, four = share[at], share[at + 1], share[at + 2], share[at + 3]
                for row in range(ROWS):
                    error = errors[before, row]
                    first[row] -= error * one
                    second[row] -= error * two
                    third[row] -= error * three
                    fourth[row] -= error * four
            for row in range(ROWS):
                errors[at, row] = first[row]
                errors[at + 1, row] = second[row]
                errors[at + 2, row] = third[row]
                errors[at + 3, row] = fourth[row]
            for place in range(at, at + _STEP):
                source = order[begin + place]
                scale = scales[source // block_size]
                for row in range(ROWS):
                    step = scale[row]
                    value = errors[place, row]
                    share_of = value / step if step > _ZERO else _ZERO
                    code, index = _CODES[0], np.uint8(0)
                    for number in range(15):
                        above = share_of > _MIDDLES[number]
                        code = _CODES[number + 1] if above else code
                        index = np.uint8(number + 1) if above else index
                    found[source, row] = index
                    errors[place, row] = value - code * step
                for behind in range(place + 1, at + _STEP):
                    factor = feedback[begin + place, behind]
                    for row in range(ROWS):
                        errors[behind, row] -= errors[place, row] * factor


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _nearest(share):  # type: ignore[no-untyped-def]
    code = _CODES[0]
    for number in range(15):
        code = _CODES[number + 1] if share > _MIDDLES[number] else code
    return code
