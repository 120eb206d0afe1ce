"""The same product for many rows on a card whose copy engine fetches tiles (Hopper and later)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from layerpack.runtime.product.tile import Tile


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile,
    programs: int,
) -> torch.Tensor:
    """As `in_order.product`, into `out`; all rows begin at multiples of 16 bytes."""
    num_rows, depth = x.shape
    columns = weight.shape[0]
    _product[(programs,)](
        TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
        bias if bias is not None else out,
        TensorDescriptor.from_tensor(out, [tile.rows, tile.columns // 2]),
        num_rows,
        columns,
        depth,
        HAS_BIAS=bias is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        GROUP=tile.group,
        PROGRAMS=programs,
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
    HAS_BIAS: tl.constexpr,  # noqa: N803 - Triton's constants
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    PROGRAMS: tl.constexpr,  # noqa: N803
):
    row_tiles, column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(columns, COLUMNS)
    in_group = GROUP * column_tiles
    # Each program takes tile after tile: the next one's first bytes arrive while one is written.
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        first = (tile // in_group) * GROUP
        height = min(row_tiles - first, GROUP)
        row = (first + (tile % in_group) % height) * ROWS
        column = ((tile % in_group) // height) * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in range(tl.cdiv(depth, DEPTH)):
            a = x.load([row, step * DEPTH])
            b = weight.load([column, step * DEPTH])
            total = tl.dot(a, b.T, total)
        if HAS_BIAS:
            cols = column + tl.arange(0, COLUMNS)
            total += tl.load(bias + cols, mask=cols < columns, other=0.0).to(tl.float32)[None, :]
        # In two halves: shared memory then has room for one more tile on its way in.
        halves = tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        out.store([row, column], left.to(out.dtype))
        out.store([row, column + COLUMNS // 2], right.to(out.dtype))
