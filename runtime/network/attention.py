"""Attention of rows over slots, as transformers' layers call it; the plain twin of the kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from layerpack.runtime.network.rows import Rows, Seen

_TILE = 64
_ROWS_AT_ONCE = 256  # bounds the keys that are gathered at a time

Attend = Callable[..., torch.Tensor]


def rows_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    rows: Rows,
    layer: tuple[int, int],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value (1, heads, rows, size) to (1, rows, heads, size).

    Keys and values are written to the rows' slots, of `layer`; each row then sees its own list of
    slots.
    """
    keys, values = rows.kv.write(
        layer, rows.slots, key[0].transpose(0, 1), value[0].transpose(0, 1)
    )
    attend = plain_attend if query.device.type == "cpu" else _kernel()
    out = attend(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        rows.seen,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
    )
    return out[None], None


@functools.cache
def _kernel() -> Attend:
    """The kernel, if there is Triton; else its twin."""
    try:
        from layerpack.runtime.network.attention_triton import attend
    except ImportError:
        return plain_attend
    return attend


def plain_attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: Seen,
    *,
    scaling: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """See `attention_triton.attend`: the same tiles in the same order, in float32."""
    count = _rows_at_once(query.device, query.shape[1], *values.shape[1:], query.shape[2])
    parts = []
    for begin in range(0, query.shape[0], count):
        some = slice(begin, begin + count)
        parts.append(
            _attend(query[some], keys, values, seen, some, scaling, window, softcap).to(query.dtype)
        )
    return torch.cat(parts)


@functools.cache
def _rows_at_once(
    device: torch.device, heads: int, kv_heads: int, value_size: int, size: int
) -> int:
    """As many as give equal bits here: one, if batches of small products depend on their number."""
    chance = torch.Generator(device).manual_seed(size)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance, device=device)

    num_rows, share = 40, heads // kv_heads
    q, k = draw(num_rows, kv_heads, share, size), draw(num_rows, kv_heads, size, _TILE)
    shares, v = draw(num_rows, kv_heads, share, _TILE), draw(num_rows, kv_heads, _TILE, value_size)
    for some in (slice(0, 1), slice(7, 8), slice(3, 5), slice(2, 39)):
        for one, other in ((q, k), (shares, v)):
            if not torch.equal(torch.matmul(one[some], other[some]), (one @ other)[some]):
                return 1
    return _ROWS_AT_ONCE


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: Seen,
    some: slice,
    scaling: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    num_rows, heads, size = query.shape
    kv_heads = keys.shape[1]
    ends, prefix, tails = seen.lengths[some, None], seen.prefix[some, None], seen.tails[some]
    starts = seen.starts[some, None]
    begins = (ends - window).clamp(min=0) if window else torch.zeros_like(ends)
    q = query.float().view(num_rows, kv_heads, heads // kv_heads, size)
    highest = torch.full((*q.shape[:3], 1), -1e30, device=query.device)
    weight = torch.zeros_like(highest)
    total = torch.zeros((*q.shape[:3], values.shape[2]), device=query.device)
    for tile in range(int(begins.min()) // _TILE * _TILE, int(ends.max()), _TILE):
        positions = torch.arange(tile, tile + _TILE, device=query.device)[None]
        in_path = seen.path[(starts + positions).clamp(max=len(seen.path) - 1)]
        in_tail = tails.gather(1, (positions - prefix).clamp(0, tails.shape[1] - 1))
        slots = torch.where(positions < prefix, in_path, in_tail)
        # Contiguous: which kernel multiplies, and in which order, goes by the strides.
        k = keys[slots].float().permute(0, 2, 3, 1).contiguous()
        v = values[slots].float().transpose(1, 2).contiguous()
        scores = torch.matmul(q, k) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        sees = ((positions < ends) & (positions >= begins))[:, None, None]
        scores = torch.where(sees, scores, -1e30)
        higher = torch.maximum(highest, scores.amax(-1, keepdim=True))
        shares = torch.where(sees, torch.exp(scores - higher), 0.0)
        kept = torch.exp(highest - higher)
        weight = weight * kept + shares.sum(-1, keepdim=True)
        total = total * kept + torch.matmul(shares, v)
        highest = higher
    return (total / weight).view(num_rows, heads, values.shape[2])
