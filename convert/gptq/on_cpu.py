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
_LINE = 16  # columns of a row that lie together while tiles are laid
_STEP = 4  # columns that take off the errors of those before them together
_RATIOS = np.array(RATIOS, np.float32)
_CODES = np.array(NF4_CODES, np.float32)
_NUMBERS = np.arange(16, dtype=np.float32)
_MIDDLES = (_CODES[1:] + _CODES[:-1]) / np.float32(2)
_ZERO, _ONE = np.float32(0), np.float32(1)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def encode_tiles(  # type: ignore[no-untyped-def]
    weight, importance, order, feedback, block_size, packed, scales
) -> None:
    """Fill `packed` (rows, in / 2) uint8, two codes each, and `scales` (rows, in / block_size).

    `weight` (rows, in), `importance` (in,), `feedback` (in, group) and `scales` are float32,
    `order` (in,) is int32. `in` is a multiple of `block_size`; it and `group` are multiples of 32.
    """
    num_rows, num_columns = weight.shape
    num_blocks = num_columns // block_size
    tile = np.zeros((num_columns, ROWS), np.float32)
    found = np.empty((num_columns, ROWS), np.uint8)
    steps = np.empty((num_blocks, ROWS), np.float32)
    for first in range(0, num_rows, ROWS):
        count = min(ROWS, num_rows - first)
        for part in range(0, num_columns, _LINE):
            for row in range(count):
                for column in range(part, part + _LINE):
                    tile[column, row] = weight[first + row, column]
        for block in range(num_blocks):
            begin = block * block_size
            end = begin + block_size
            _scales(tile[begin:end], importance[begin:end], steps[block])
        _codes(tile, steps, order, feedback, block_size, found)
        for part in range(0, num_columns, _LINE):
            for row in range(count):
                for column in range(part, part + _LINE, 2):
                    pair = found[column, row] << 4 | found[column + 1, row]
                    packed[first + row, column // 2] = pair
        for row in range(count):
            for block in range(num_blocks):
                scales[first + row, block] = steps[block, row]


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _scales(block, importance, best) -> None:  # type: ignore[no-untyped-def]
    """`best` (rows,): of the scales tried for `block` (columns, rows), that of the least error.

    For the codes that each ratio of the largest weight gives, the scale of the least error is
    aimed / norm, which takes aimed * aimed / norm off the error of zeros alone.
    """
    most, gain = np.zeros(ROWS, np.float32), np.zeros(ROWS, np.float32)
    inverse = np.empty(ROWS, np.float32)
    aimed, norm = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    for column in range(len(block)):
        for row in range(ROWS):
            most[row] = max(most[row], abs(block[column, row]))
    for row in range(ROWS):
        best[row] = most[row]
    for ratio in _RATIOS:
        for row in range(ROWS):
            scale = most[row] * ratio
            inverse[row] = _ONE / scale if scale > _ZERO else _ZERO
            aimed[row] = _ZERO
            norm[row] = _ZERO
        for column in range(len(block)):
            weighed = importance[column]
            for row in range(ROWS):
                value = block[column, row]
                code = _nearest(value * inverse[row])
                weighed_code = weighed * code
                aimed[row] += weighed_code * value
                norm[row] += weighed_code * code
        for row in range(ROWS):
            if aimed[row] > _ZERO:
                scale = aimed[row] / norm[row]
                if aimed[row] * scale > gain[row]:
                    gain[row] = aimed[row] * scale
                    best[row] = scale


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
