"""x @ W.T on a GPU, each row's bits a function of that row alone: one order of adding up over K.

cuBLAS chooses kernels, and how many parts K is summed in, by the number of rows, so a token's
logits would depend on how many others are in the pass. Here K is walked from its beginning to its
end, in steps of the tensor cores' own 16, by one program for each tile of the output: no parts of
K, no atomics. Tiles of any size then give equal bits, so each number of rows has what is fastest.
Source of the idea: He et al., Defeating Nondeterminism in LLM Inference,
https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference/.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from layerpack.runtime.product import copy_engine
from layerpack.runtime.product.tile import Tile, tile_for

_COPY_ENGINE_FROM, _FETCHED_ROWS = 9, 128
_LEAST_SHARED_BYTES = 99 << 10


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: Tile | None = None
) -> torch.Tensor:
    """x (rows, in) times weight (out, in), both contiguous in their last dimension, to (rows, out).

    16-bit types; sums are float32, rounded once, bias included.
    """
    num_rows, depth = x.shape
    columns = weight.shape[0]
    tile = tile or tile_for(num_rows, columns)
    out = torch.empty((num_rows, columns), dtype=x.dtype, device=x.device)
    if x.is_cuda:
        card = torch.cuda.get_device_properties(x.device)
        fetched = card.major >= _COPY_ENGINE_FROM and tile.rows >= _FETCHED_ROWS
        if fetched and depth % 8 == columns % 8 == 0 and not x.data_ptr() % 16:
            programs = min(tile.count(num_rows, columns), card.multi_processor_count)
            return copy_engine.product(x, weight, bias, out, tile, programs)
        tile = tile.fitting(getattr(card, "shared_memory_per_block_optin", _LEAST_SHARED_BYTES))
    _product[(tile.count(num_rows, columns),)](
        x,
        weight,
        bias if bias is not None else out,
        out,
        num_rows,
        columns,
        depth,
        x.stride(0),
        weight.stride(0),
        HAS_BIAS=bias is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        GROUP=tile.group,
        EVEN=depth % tile.depth == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator, unused-ignore]
def _product(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    num_rows,
    columns,
    depth,
    x_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,  # noqa: N803 - Triton's constants
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    EVEN: tl.constexpr,  # noqa: N803
):
    # Programs next to each other share columns of the weight, of `GROUP` tiles of rows.
    program = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(columns, COLUMNS)
    in_group = GROUP * column_tiles
    first = (program // in_group) * GROUP
    height = min(row_tiles - first, GROUP)
    row_tile = first + (program % in_group) % height
    column_tile = (program % in_group) // height

    rows = row_tile * ROWS + tl.arange(0, ROWS)
    cols = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, DEPTH)
    # Beyond the edge some row or column is read once more, and not written.
    x_at = x + (rows % num_rows).to(tl.int64)[:, None] * x_stride + steps[None, :]
    weight_at = weight + (cols % columns).to(tl.int64)[None, :] * weight_stride + steps[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(0, depth, DEPTH):
        if EVEN:
            a = tl.load(x_at)
            b = tl.load(weight_at)
        else:
            left = steps < depth - begin
            a = tl.load(x_at, mask=left[None, :], other=0.0)
            b = tl.load(weight_at, mask=left[:, None], other=0.0)
        total = tl.dot(a, b, total)
        x_at += DEPTH
        weight_at += DEPTH
    if HAS_BIAS:
        total += tl.load(bias + cols, mask=cols < columns, other=0.0).to(tl.float32)[None, :]
    inside = (rows < num_rows)[:, None] & (cols < columns)[None, :]
    out_at = out + rows.to(tl.int64)[:, None] * columns + cols[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)
