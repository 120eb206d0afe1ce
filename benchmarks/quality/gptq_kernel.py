"""GPTQ's columns of a block on a GPU: a row's weights stay in registers until all have codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 16


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _columns(  # type: ignore[no-untyped-def]
    left, scales, upper, values, found, errors, num_rows, left_stride, scale_stride, upper_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803 - Triton's constants
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    is_row = rows < num_rows
    places = rows[:, None].to(tl.int64) * left_stride + columns[None, :]
    tile = tl.load(left + places, mask=is_row[:, None], other=0.0)
    for column in range(WIDTH):
        value = tl.sum(tl.where(columns[None, :] == column, tile, 0.0), axis=1)
        scale = tl.load(scales + rows.to(tl.int64) * scale_stride + column, mask=is_row, other=1.0)
        share = value / scale
        below = tl.load(values)
        code = tl.zeros([ROWS], tl.float32) + below
        for index in range(1, 16):
            above = tl.load(values + index)
            code = tl.where(share > (below + above) / 2, above, code)
            below = above
        put = (code * scale).to(tl.bfloat16).to(tl.float32)
        error = (value - put) / tl.load(upper + column * upper_stride + column)
        after = tl.load(upper + column * upper_stride + columns)
        tile -= tl.where(columns[None, :] > column, error[:, None] * after[None, :], 0.0)
        place = rows.to(tl.int64) * WIDTH + column
        tl.store(found + place, code, mask=is_row)
        tl.store(errors + place, error, mask=is_row)


def one_block(
    left: torch.Tensor, scales: torch.Tensor, upper: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors (out, columns) of a power of two of columns; `values`: NF4's sixteen."""
    num_rows, width = left.shape
    found, errors = torch.empty(2, num_rows, width, device=left.device)
    _columns[(triton.cdiv(num_rows, ROWS),)](
        left, scales, upper, values, found, errors,
        num_rows, left.stride(0), scales.stride(0), upper.stride(0), WIDTH=width, ROWS=ROWS,
    )  # fmt: skip
    return found, errors
