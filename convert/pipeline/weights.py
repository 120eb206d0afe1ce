"""A checkpoint's weights as 16-bit tensors, piece by piece, whatever they are stored as."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from layerpack.convert.plan.plan import Item
from layerpack.convert.plan.storage import Scale, Storage
from layerpack.convert.source.protocol import Source
from layerpack.formats.blob.layout import Nf4Spec
from layerpack.formats.units import num_elements
from layerpack.libraries.dtypes import TORCH_DTYPES

PIECE_BYTES = 8 << 20
"""What a piece of a tensor takes in the source, at most; but a row is never cut.

Small enough for the allocator to hand the same memory out again: fresh pages cost more than the
read itself. And for a core's share of the cache to hold it from one step to the next.
"""
GPU_PIECE_BYTES = 32 << 20
"""The same where a GPU encodes. A piece takes some forty calls, after each of which its thread
waits for its turn among the others in Python: with small pieces that is most of the time.
"""
_WHOLE_TIMES = 12
"""Bytes per element while a tensor that cannot be cut is made: floats, twice, and the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A piece of an item to be read: its rows [begin, end), or None: all of it.

    Of a weight that is NF4 already, the stored `part` of that name. `source_bytes` is its share of
    the item's, `memory_bytes` what reading it takes for a while.
    """

    item: Item
    rows: tuple[int, int] | None = None
    part: str | None = None
    source_bytes: int
    memory_bytes: int
    is_last: bool


class WeightReader:
    """Reads items of a plan. FP8 is dequantised, wider types are rounded to the model's dtype."""

    def __init__(
        self, source: Source, storage: Storage, *, device: torch.device = torch.device("cpu")
    ) -> None:
        """Pieces are as large as suits `device`, and pinned for it if it is a GPU."""
        self._source, self._storage = source, storage
        self._pin = device.type == "cuda"
        self._piece_bytes = GPU_PIECE_BYTES if self._pin else PIECE_BYTES

    def cuts(self, item: Item) -> Iterator[Cut]:
        """The pieces of an item, along its first dimension; all but the last hold whole blocks."""
        stored = self._source.tensors[item.source]
        elements = num_elements(stored.shape)
        if not stored.shape or not elements or stored.whole_only:
            times = _WHOLE_TIMES if stored.whole_only else 1
            yield Cut(
                item=item,
                source_bytes=item.source_bytes,
                memory_bytes=elements * times,
                is_last=True,
            )
            return
        count, row_elements = stored.shape[0], elements // stored.shape[0]
        unit = 1
        if isinstance(item.spec, Nf4Spec):
            unit = item.spec.block_size // math.gcd(item.spec.block_size, row_elements)
        scale = self._storage.scales.get(item.source)
        if scale is not None and scale.block[0] < count:
            unit = math.lcm(unit, scale.block[0])
        fitting = self._piece_bytes * count // max(1, stored.length_bytes)
        step = max(unit, fitting - fitting % unit)
        for first in range(0, count, step):
            end = min(first + step, count)
            yield Cut(
                item=item,
                rows=(first, end),
                source_bytes=item.source_bytes * end // count - item.source_bytes * first // count,
                memory_bytes=stored.length_bytes // count * (end - first),
                is_last=end == count,
            )

    def read(
        self, cut: Cut, *, name: str | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A piece in `dtype` (None: the model's), or the same of the tensor `name`.

        Raises SourceError.
        """
        name = name or cut.item.source
        tensor = self._source.read(name, cut.rows, pin=self._pin)
        if (scale := self._storage.scales.get(name)) is not None:
            tensor = tensor.float() * self._factors(scale, cut, tensor)
        return tensor.to(dtype or TORCH_DTYPES[cut.item.dtype])

    def _factors(self, scale: Scale, cut: Cut, weight: torch.Tensor) -> torch.Tensor:
        """What the rows of a piece are multiplied with: float32, (rows or 1, columns or 1)."""
        (rows, columns), (first, end) = scale.block, cut.rows or (0, weight.shape[0])
        stored = self._source.tensors[scale.name]
        if num_elements(stored.shape) == 1:
            factors = self._source.read(scale.name).reshape(1, 1)
        else:
            factors = self._source.read(scale.name, (first // rows, -(-end // rows)))
            factors = factors.reshape(factors.shape[0], -1)
        if factors.dtype == torch.uint8:  # exponents of 2, as F8_E8M0 has them
            factors = (factors.float() - 127).exp2()
        factors = factors.float()
        if factors.shape[0] > 1:
            factors = factors.repeat_interleave(rows, 0)[: end - first]
        if factors.shape[1] > 1:
            factors = factors.repeat_interleave(columns, 1)[:, : weight.shape[1]]
        return factors


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory, as bytes. Keeps the tensor alive."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
