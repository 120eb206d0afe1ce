"""How a product is cut into tiles: a table of what was measured, and what a card has room for."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one product is cut: rows, columns and depth of a tile, warps, copies under way.

    `group` tiles of rows share the columns that are in the cache.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8

    def count(self, num_rows: int, columns: int) -> int:
        """Tiles of an output of this size."""
        return -(-num_rows // self.rows) * -(-columns // self.columns)

    def fitting(self, shared_bytes: int) -> Tile:
        """The same, or less deep, for a card with so much shared memory for a program."""
        tile = self
        while 2 * (tile.rows + tile.columns) * tile.depth * tile.stages > shared_bytes:
            if tile.stages > 2:
                tile = replace(tile, stages=tile.stages - 1)
            elif tile.depth > 32:
                tile = replace(tile, depth=tile.depth // 2, stages=self.stages)
            else:
                tile = replace(tile, columns=tile.columns // 2)
        return tile


_NARROW = 2048  # columns: with large tiles most of a large card would have none


def tile_for(num_rows: int, columns: int) -> Tile:
    """What was fastest on an H100 for about so much (benchmarks/products.py --tune)."""
    narrow = columns <= _NARROW
    if num_rows <= 16:
        return Tile(rows=16, columns=32 if narrow else 64, depth=256, warps=4, stages=5)
    if num_rows <= 64:
        return Tile(rows=64, columns=32 if narrow else 64, depth=128, warps=4, stages=5)
    if narrow and num_rows <= 512:
        return Tile(rows=64, columns=64, depth=64, warps=8, stages=4)
    if narrow or (num_rows <= 512 and columns < 2 * 8192):
        return Tile(rows=128, columns=128, depth=64, warps=4, stages=4)
    return Tile(rows=128, columns=256, depth=64, warps=8, stages=4 if num_rows <= 512 else 3)
