"""Scales and codes on a GPU: the float32 operations of on_cpu.py, in the same order, not fused."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_ROWS, _PANEL, _AHEAD = 32, 32, 8


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _scales(  # type: ignore[no-untyped-def]
    weight, importance, ratios, middles, values, best, num_rows, num_ratios,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803 - Triton's constants
):  # fmt: skip
    """`weight` (in, num_rows), `best` (in / BLOCK_SIZE, num_rows): see on_cpu.py."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block, stride = tl.program_id(1), tl.cast(num_rows, tl.int64)
    first = weight + block * BLOCK_SIZE * stride + rows
    most = tl.zeros([ROWS], tl.float32)
    for column in range(BLOCK_SIZE):
        most = tl.maximum(most, tl.abs(tl.load(first + column * stride)))
    found = most
    most_gain = tl.zeros([ROWS], tl.float32)
    for number in range(num_ratios):
        scale = most * tl.load(ratios + number)
        inverse = tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)
        aimed = tl.zeros([ROWS], tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        for column in range(BLOCK_SIZE):
            value = tl.load(first + column * stride)
            weighed = tl.load(importance + block * BLOCK_SIZE + column)
            code, _index = _nearest(value * inverse, middles, values)
            weighed_code = weighed * code
            aimed += weighed_code * value
            norm += weighed_code * code
        is_aimed = aimed > 0
        scale = tl.where(is_aimed, tl.div_rn(aimed, tl.where(is_aimed, norm, 1.0)), 0.0)
        gain = aimed * scale
        found = tl.where(gain > most_gain, scale, found)
        most_gain = tl.maximum(gain, most_gain)
    tl.store(best + block * stride + rows, found)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _codes(  # type: ignore[no-untyped-def]
    weight, scales, order, feedback, middles, values, errors, found, num_rows, num_columns, group,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
    PANEL: tl.constexpr, AHEAD: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`weight`, `errors` (in the order of codes), `found`: (in, num_rows); see on_cpu.py.

    A panel of columns is kept in registers: what errors before it take off, AHEAD of which are
    loaded at once, then its own.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * group
    count = tl.minimum(group, num_columns - begin)
    inside = tl.arange(0, PANEL)
    stride = tl.cast(num_rows, tl.int64)
    own = errors + begin * stride + rows
    feedback += begin * tl.cast(group, tl.int64)
    for at in range(0, count, PANEL):
        sources = tl.load(order + begin + at + inside).to(tl.int64)
        panel = tl.load(weight + sources[:, None] * stride + rows[None, :])
        steps = tl.load(scales + (sources // BLOCK_SIZE)[:, None] * stride + rows[None, :])
        for before in range(0, at, AHEAD):
            for ahead in tl.static_range(AHEAD):
                error = tl.load(own + (before + ahead) * stride)
                share = tl.load(feedback + (before + ahead) * group + at + inside)
                panel = panel - error[None, :] * share[:, None]
        for place in range(PANEL):
            is_here = inside[:, None] == place
            value = tl.sum(tl.where(is_here, panel, 0.0), axis=0)
            step = tl.sum(tl.where(is_here, steps, 0.0), axis=0)
            share_of = tl.where(step > 0, tl.div_rn(value, tl.where(step > 0, step, 1.0)), 0.0)
            code, index = _nearest(share_of, middles, values)
            source = tl.load(order + begin + at + place).to(tl.int64)
            tl.store(found + source * stride + rows, index.to(tl.uint8))
            error = value - code * step
            tl.store(own + (at + place) * stride, error)
            share = tl.load(
                feedback + (at + place) * group + at + inside, mask=inside > place, other=0.0
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
    tiles, groups = triton.cdiv(num_rows, _ROWS), triton.cdiv(num_columns, feedback.shape[1])
    # Rows of zeros fill the last tile, so that columns begin where 16 bytes can be loaded at once.
    columns = torch.zeros(num_columns, tiles * _ROWS, device=weight.device)
    columns[:, :num_rows] = weight.T
    scales = columns.new_empty(num_columns // block_size, tiles * _ROWS)
    found = torch.empty_like(columns, dtype=torch.uint8)
    unfused: dict[str, Any] = {"enable_fp_fusion": False}
    _scales[(tiles, len(scales))](
        columns, importance, ratios, middles, values, scales, tiles * _ROWS, len(ratios),
        BLOCK_SIZE=block_size, ROWS=_ROWS, num_warps=1, **unfused,
    )  # fmt: skip
    _codes[(tiles, groups)](
        columns, scales, order, feedback, middles, values, torch.empty_like(columns), found,
        tiles * _ROWS, num_columns, feedback.shape[1],
        BLOCK_SIZE=block_size, ROWS=_ROWS, PANEL=_PANEL, AHEAD=_AHEAD, num_warps=2, **unfused,
    )  # fmt: skip
    return found[:, :num_rows].T.contiguous(), scales[:, :num_rows].T.contiguous()
