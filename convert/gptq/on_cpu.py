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

ROWS = 128
"""Of a tile: as many numbers as keep a core's vector unit busy."""
_STEP = 4  # columns that take off the errors of those before them together
_RATIOS = np.array(RATIOS, np.float32)
_CODES = np.array(NF4_CODES, np.float32)
_NUMBERS = np.arange(16, dtype=np.float32)
_MIDDLES = (_CODES[1:] + _CODES[:-1]) / np.float32(2)
_ZERO, _ONE, _INFINITE = np.float32(0), np.float32(1), np.float32(np.inf)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def encode_tiles(  # type: ignore[no-untyped-def]
    weight, importance, order, feedback, block_size, codes, scales
) -> None:
    """Fill `codes` (in, rows) uint8, one each, and `scales` (in / block_size, rows) float32.

    `weight` (in, rows), `importance` (in,) and `feedback` (in, group) are float32, `order` (in,)
    is int32. `in` and `group` are multiples of `block_size` and of 4.
    """
    num_columns, num_rows = weight.shape
    num_blocks = num_columns // block_size
    tile = np.empty((num_columns, ROWS), np.float32)
    found = np.empty((num_columns, ROWS), np.uint8)
    steps = np.empty((num_blocks, ROWS), np.float32)
    for first in range(0, num_rows, ROWS):
        count = min(ROWS, num_rows - first)
        for column in range(num_columns):
            for row in range(count):
                tile[column, row] = weight[column, first + row]
            for row in range(count, ROWS):
                tile[column, row] = _ZERO
        for block in range(num_blocks):
            begin = block * block_size
            _scales(
                tile[begin : begin + block_size],
                importance[begin : begin + block_size],
                steps[block],
            )
        _codes(tile, steps, order, feedback, block_size, found)
        for column in range(num_columns):
            for row in range(count):
                codes[column, first + row] = found[column, row]
        for block in range(num_blocks):
            for row in range(count):
                scales[block, first + row] = steps[block, row]


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
    numbers = np.empty(ROWS, np.float32)
    for begin in range(0, num_columns, group):
        count = min(group, num_columns - begin)
        for at in range(0, count, _STEP):
            sources = order[begin + at : begin + at + _STEP]
            for row in range(ROWS):
                first[row] = tile[sources[0], row]
                second[row] = tile[sources[1], row]
                third[row] = tile[sources[2], row]
                fourth[row] = tile[sources[3], row]
            for before in range(0, at, _STEP):
                shares = feedback[begin + before : begin + before + _STEP, at : at + _STEP]
                one_a, one_b, one_c, one_d = shares[0]
                two_a, two_b, two_c, two_d = shares[1]
                three_a, three_b, three_c, three_d = shares[2]
                four_a, four_b, four_c, four_d = shares[3]
                for row in range(ROWS):
                    one, two = errors[before, row], errors[before + 1, row]
                    three, four = errors[before + 2, row], errors[before + 3, row]
                    first[row] = (
                        first[row] - one * one_a - two * two_a - three * three_a - four * four_a
                    )
                    second[row] = (
                        second[row] - one * one_b - two * two_b - three * three_b - four * four_b
                    )
                    third[row] = (
                        third[row] - one * one_c - two * two_c - three * three_c - four * four_c
                    )
                    fourth[row] = (
                        fourth[row] - one * one_d - two * two_d - three * three_d - four * four_d
                    )
            for row in range(ROWS):
                errors[at, row] = first[row]
                errors[at + 1, row] = second[row]
                errors[at + 2, row] = third[row]
                errors[at + 3, row] = fourth[row]
            for place in range(at, at + _STEP):
                source = order[begin + place]
                _code(errors[place], scales[source // block_size], numbers, found[source])
                for behind in range(place + 1, at + _STEP):
                    factor = feedback[begin + place, behind]
                    for row in range(ROWS):
                        errors[behind, row] -= errors[place, row] * factor


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _code(error, scale, numbers, found) -> None:  # type: ignore[no-untyped-def]
    """`found` (rows,): codes of a column, which `error` holds; then what they miss.

    `numbers` (rows,) float32 are for a while: numbers of one type are taken many at a time.
    """
    for row in range(ROWS):
        step, value = scale[row], error[row]
        share = value / step if step > _ZERO else _ZERO
        code, index = _CODES[0], _ZERO
        for number in range(15):
            above = share > _MIDDLES[number]
            code = _CODES[number + 1] if above else code
            index = _NUMBERS[number + 1] if above else index
        numbers[row] = index
        error[row] = value - code * step
    for row in range(ROWS):
        found[row] = np.uint8(numbers[row])


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _nearest(share):  # type: ignore[no-untyped-def]
    code = _CODES[0]
    for number in range(15):
        code = _CODES[number + 1] if share > _MIDDLES[number] else code
    return code
