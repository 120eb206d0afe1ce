"""Scales and codes on a GPU: the float32 operations of on_cpu.py, in the same order, not fused."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_ROWS, _PANEL = 64, 32


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _scales(  # type: ignore[no-untyped-def]
    weight, importance, ratios, middles, values, best, num_rows, num_ratios,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803 - Triton's constants
):  # fmt: skip
    """`weight` (in, num_rows), `best` (in / BLOCK_SIZE, num_rows): see on_cpu.py."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block, stride = tl.program_id(1), tl.cast(num_rows, tl.int64)
    is_row = rows < num_rows
    first = weight + block * BLOCK_SIZE * stride + rows
    most = tl.zeros([ROWS], tl.float32)
    for column in range(BLOCK_SIZE):
        value = tl.load(first + column * stride, mask=is_row, other=0.0)
        most = tl.maximum(most, tl.abs(value))
    found = most
    least = tl.full([ROWS], float("inf"), tl.float32)
    for number in range(num_ratios):
        scale = most * tl.load(ratios + number)
        for _ in range(2):
            inverse = tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)
            error = tl.zeros([ROWS], tl.float32)
            aimed = tl.zeros([ROWS], tl.float32)
            norm = tl.zeros([ROWS], tl.float32)
            for column in range(BLOCK_SIZE):
                value = tl.load(first + column * stride, mask=is_row, other=0.0)
                weighed = tl.load(importance + block * BLOCK_SIZE + column)
                code, _index = _nearest(value * inverse, middles, values)
                missing = value - code * scale
                error += weighed * (missing * missing)
                weighed_code = weighed * code
                aimed += weighed_code * value
                norm += weighed_code * code
            is_better = error < least
            least = tl.where(is_better, error, least)
            found = tl.where(is_better, scale, found)
            is_aimed = aimed > 0
            scale = tl.where(is_aimed, tl.div_rn(aimed, tl.where(is_aimed, norm, 1.0)), scale)
    tl.store(best + block * stride + rows, found, mask=is_row)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _codes(  # type: ignore[no-untyped-def]
    weight, scales, order, feedback, middles, values, errors, found, num_rows, num_columns, group,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, PANEL: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`weight`, `errors` (in the order of codes), `found`: (in, num_rows); see on_cpu.py."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    begin = tl.program_id(1) * group
    count = tl.minimum(group, num_columns - begin)
    inside = tl.arange(0, PANEL)
    stride = tl.cast(num_rows, tl.int64)
    own = errors + begin * stride + rows
    feedback += begin * tl.cast(group, tl.int64)
    for at in range(0, count, PANEL):
        is_column = at + inside < count
        sources = tl.load(order + begin + at + inside, mask=is_column, other=0).to(tl.int64)
        is_here = is_column[:, None] & is_row[None, :]
        panel = tl.load(weight + sources[:, None] * stride + rows[None, :], mask=is_here, other=0.0)
        for before in range(at):
            error = tl.load(own + before * stride, mask=is_row, other=0.0)
            share = tl.load(
                feedback + before * group + at + inside,
                mask=is_column,
                other=0.0,
            )
            panel = panel - error[None, :] * share[:, None]
        for place in range(tl.minimum(PANEL, count - at)):
            value = tl.sum(tl.where(inside[:, None] == place, panel, 0.0), axis=0)
            source = tl.load(order + begin + at + place).to(tl.int64)
            step = tl.load(scales + source // BLOCK_SIZE * stride + rows, mask=is_row, other=1.0)
            share_of = tl.where(step > 0, tl.div_rn(value, tl.where(step > 0, step, 1.0)), 0.0)
            code, index = _nearest(share_of, middles, values)
            tl.store(found + source * stride + rows, index.to(tl.uint8), mask=is_row)
            error = value - code * step
            tl.store(own + (at + place) * stride, error, mask=is_row)
            share = tl.load(
                feedback + (at + place) * group + at + inside,
                mask=is_column & (inside > place),
                other=0.0,
            )
            panel = panel - error[None, :] * share[:, None]
        tl.debug_barrier()  # what is stored here, other threads load in the next panel


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _nearest(share, middles, values):  # type: ignore[no-untyped-def]
    code = tl.zeros_like(share) + tl.load(values)
    index = tl.zeros_like(share).to(tl.int32)
    for number in tl.static_range(15):
        is_above = share > tl.load(middles + number)
        code = tl.where(is_above, tl.load(values + number + 1), code)
        index = tl.where(is_above, number + 1, index)
    return code, index


def encode_columns(
    weight: torch.Tensor,
    block_size: int,
    *,
    importance: torch.Tensor,
    order: torch.Tensor,
    feedback: torch.Tensor,
    ratios: torch.Tensor,
    middles: torch.Tensor,
    values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, in) uint8, one each, and scales (rows, in / block_size), as on a CPU.

    `ratios`, `middles` and `values`: those of on_cpu.py, on the device as everything else.
    """
    num_rows, num_columns = weight.shape
    columns = weight.float().T.contiguous()
    scales = torch.empty(num_columns // block_size, num_rows, device=weight.device)
    unfused: dict[str, Any] = {"enable_fp_fusion": False}
    tiles = triton.cdiv(num_rows, _ROWS)
    _scales[(tiles, num_columns // block_size)](
        columns, importance, ratios, middles, values, scales, num_rows, len(ratios),
        BLOCK_SIZE=block_size, ROWS=_ROWS, num_warps=2, **unfused,
    )  # fmt: skip
    found = torch.empty(num_columns, num_rows, dtype=torch.uint8, device=weight.device)
    group = feedback.shape[1]
    _codes[(tiles, triton.cdiv(num_columns, group))](
        columns, scales, order, feedback, middles, values, torch.empty_like(columns), found,
        num_rows, num_columns, group,
        BLOCK_SIZE=block_size, ROWS=_ROWS, PANEL=_PANEL, num_warps=4, **unfused,
    )  # fmt: skip
    return found.T.contiguous(), scales.T.contiguous()
