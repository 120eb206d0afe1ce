"""A checkpoint's weights as 16-bit tensors, whole or in pieces, whatever they are stored as."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from layerpack.convert.dtypes import TORCH_DTYPES
from layerpack.convert.naming import FP8_SCALE
from layerpack.convert.plan import Item
from layerpack.convert.source import Source
from layerpack.convert.storage import Storage
from layerpack.formats.units import num_elements

PIECE_BYTES = 8 << 20
"""What a piece of a tensor takes in the source, about; a row is never cut.

Small enough for the allocator to hand the same memory out again: fresh pages cost more than the
read itself.
"""


class WeightReader:
    """Reads items of a plan. FP8 is dequantised, wider types are rounded to the model's dtype."""

    def __init__(self, source: Source, storage: Storage) -> None:
        self._source, self._storage = source, storage

    def whole(self, item: Item) -> torch.Tensor:
        """The tensor in the model's dtype. Takes its size in memory and that of a few pieces."""
        stored = self._source.tensors[item.source]
        dtype = TORCH_DTYPES[item.dtype]
        if stored.dtype == item.dtype:
            return self._source.read(item.source)
        result = torch.empty(stored.shape, dtype=dtype)
        for first, end in self._cuts(item):
            result[first:end] = self._rows(item, first, end)
        return result

    def pieces(self, item: Item) -> Iterator[torch.Tensor]:
        """The tensor in the model's dtype, cut along its first dimension."""
        stored = self._source.tensors[item.source]
        if not stored.shape or not num_elements(stored.shape):
            yield self._source.read(item.source).to(TORCH_DTYPES[item.dtype])
            return
        for first, end in self._cuts(item):
            yield self._rows(item, first, end)

    def _cuts(self, item: Item) -> Iterator[tuple[int, int]]:
        stored = self._source.tensors[item.source]
        step = max(1, PIECE_BYTES * stored.shape[0] // max(1, stored.length_bytes))
        if self._storage.fp8_block:
            block = self._storage.fp8_block[0]
            step = max(block, step // block * block)
        for first in range(0, stored.shape[0], step):
            yield first, min(first + step, stored.shape[0])

    def _rows(self, item: Item, first: int, end: int) -> torch.Tensor:
        rows = self._source.read(item.source, (first, end))
        scale_name = item.source + FP8_SCALE
        if self._storage.fp8_block and scale_name in self._source.tensors:
            block, columns = self._storage.fp8_block
            scale = self._source.read(scale_name, (first // block, -(-end // block)))
            scale = scale.float().repeat_interleave(block, 0)[: end - first]
            rows = rows.float() * scale.repeat_interleave(columns, 1)[:, : rows.shape[1]]
        return rows.to(TORCH_DTYPES[item.dtype])


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: by the extremes, ten times faster than by each value."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory, as bytes. Keeps the tensor alive."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
