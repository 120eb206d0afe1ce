"""Attention by slots on a GPU: every row walks its own keys in order of position, tile by tile.

Tiles of 64 positions begin at multiples of 64 and softmax goes along with them (online), so what a
row gets depends on its keys and their order alone: not on where they lie, nor on who else is there.
Source: Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135; Kwon et al., PagedAttention,
https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from layerpack.runtime.network.rows import Seen


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: Seen,
    *,
    scaling: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """query (rows, heads, size), keys and values (slots, KV heads, size) to (rows, heads, size).

    `window` 0: all positions are seen, else the last so many; `softcap` 0: none.
    """
    num_rows, heads, size = query.shape
    kv_heads, value_size = values.shape[1], values.shape[2]
    share = heads // kv_heads
    padded = triton.next_power_of_2(share)
    # One size of blocks and one number of warps: how the sums of a row go through the lanes of a
    # card depends on both. A row that sees slots of its own has a block, others share one.
    block = max(16, padded)
    out = torch.empty((num_rows, heads, value_size), dtype=query.dtype, device=query.device)
    alone = (seen.runs[-1][1] if seen.runs else 0, num_rows)
    for first, end, together in (*((*run, block // padded) for run in seen.runs), (*alone, 1)):
        if first == end:
            continue
        _attend[(triton.cdiv(end - first, together), kv_heads)](
            query,
            keys,
            values,
            seen.path,
            seen.starts,
            seen.prefix,
            seen.tails,
            seen.lengths,
            out,
            first,
            end,
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            seen.tails.stride(0),
            scaling,
            softcap,
            window,
            SHARE=share,
            HEADS=padded,
            TOGETHER=together,
            BLOCK=block,
            SIZE=size,
            SIZE_PADDED=max(16, triton.next_power_of_2(size)),
            VALUE_SIZE=value_size,
            VALUE_PADDED=max(16, triton.next_power_of_2(value_size)),
            HAS_TAILS=together == 1,
            HAS_CAP=softcap > 0,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=4,
            num_stages=2,
        )
    return out


# Else a kernel would be compiled anew for numbers that are 1, or divide by 16.
@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["first_row", "end_row", "tail_stride", "window"]
)
def _attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    path,
    starts,
    prefix,
    tails,
    lengths,
    out,
    first_row,
    end_row,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    tail_stride,
    scaling,
    softcap,
    window,
    SHARE: tl.constexpr,  # noqa: N803 - Triton's constants
    HEADS: tl.constexpr,  # noqa: N803
    TOGETHER: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    SIZE_PADDED: tl.constexpr,  # noqa: N803
    VALUE_SIZE: tl.constexpr,  # noqa: N803
    VALUE_PADDED: tl.constexpr,  # noqa: N803
    HAS_TAILS: tl.constexpr,  # noqa: N803
    HAS_CAP: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    kv_head = tl.program_id(1)
    places = tl.arange(0, BLOCK)
    rows = first_row + tl.program_id(0) * TOGETHER + places // HEADS
    heads = places % HEADS
    real = (places // HEADS < TOGETHER) & (rows < end_row) & (heads < SHARE)
    ends = tl.load(lengths + rows, mask=real, other=0).to(tl.int32)
    begins = tl.where(window > 0, tl.maximum(ends - window, 0), 0)
    dims = tl.arange(0, SIZE_PADDED)
    value_dims = tl.arange(0, VALUE_PADDED)
    query_heads = (kv_head * SHARE + heads)[:, None]
    query_at = query + rows.to(tl.int64)[:, None] * query_stride + query_heads * query_head_stride
    q = tl.load(query_at + dims[None, :], mask=real[:, None] & (dims < SIZE)[None, :], other=0.0)

    highest = tl.full((BLOCK,), -1e30, tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK, VALUE_PADDED), tl.float32)
    first = tl.min(tl.where(real, begins, 2147483647)) // 64 * 64
    row = first_row + tl.program_id(0) * TOGETHER
    own_path = path + tl.load(starts + row)
    for tile in range(first, tl.max(ends), 64):
        positions = tile + tl.arange(0, 64)
        if HAS_TAILS:
            own, length = tl.load(prefix + row), tl.load(lengths + row)
            slots = tl.load(own_path + positions, mask=positions < own, other=0)
            in_tail = (positions >= own) & (positions < length)
            tail_at = tails + row.to(tl.int64) * tail_stride + positions - own
            slots += tl.load(tail_at, mask=in_tail, other=0)
        else:
            slots = tl.load(own_path + positions, mask=positions < tl.max(ends), other=0)
        there = positions < tl.max(ends)
        key_at = keys + slots[None, :] * key_stride + kv_head * key_head_stride + dims[:, None]
        k = tl.load(key_at, mask=there[None, :] & (dims < SIZE)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scaling
        if HAS_CAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * (scores / softcap))) - 1.0)
        sees = (positions[None, :] < ends[:, None]) & (positions[None, :] >= begins[:, None])
        scores = tl.where(sees, scores, -1e30)
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A tile of which a row sees nothing changes nothing of it, to the bit.
        shares = tl.where(sees, tl.exp(scores - higher[:, None]), 0.0)
        kept = tl.exp(highest - higher)
        weight = weight * kept + tl.sum(shares, 1)
        value_at = values + slots[:, None] * value_stride + kv_head * value_head_stride
        v_mask = there[:, None] & (value_dims < VALUE_SIZE)[None, :]
        v = tl.load(value_at + value_dims[None, :], mask=v_mask, other=0.0)
        total = tl.dot(shares.to(v.dtype), v, total * kept[:, None], input_precision=PRECISION)
        highest = higher
    result = total / tl.where(weight > 0, weight, 1.0)[:, None]
    out_at = out + rows.to(tl.int64)[:, None] * (SHARE * tl.num_programs(1) * VALUE_SIZE)
    out_at += query_heads * VALUE_SIZE + value_dims[None, :]
    inside = real[:, None] & (value_dims < VALUE_SIZE)[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=inside)
