"""What the stream moves: one contiguous byte range of one blob for each layer or part of lm_head.

A pass uses them in order: every layer, then lm_head. lm_head is large (2.5 GB for a vocabulary of
152,064 in bf16), so it travels as row ranges no larger than a layer and never needs a slot of
its own. Its constants (norms, and absmax if it is quantised) are small and stay on the device.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from layerpack.formats.blob.header import TensorEntry
from layerpack.formats.frames.table import FrameTable
from layerpack.formats.manifest.facts import Blob
from layerpack.formats.pack import Pack
from layerpack.formats.units import PAGE_BYTES, align_up


class Kind(Enum):
    """Which part of the model a slice holds."""

    LAYER = "layer"
    HEAD = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What one read of a slice is: small enough that many are under way at once.

    `length_bytes` from `offset_bytes` of the file at `path`; `title` names the slice.
    """

    path: Path
    offset_bytes: int
    length_bytes: int
    title: str

    @property
    def end_bytes(self) -> int:
        """The first byte after it."""
        return self.offset_bytes + self.length_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """`length_bytes` from `offset_bytes` of the file at `path`; `index` is its place in a pass.

    For a layer `number` is the layer's; for lm_head it counts the row ranges, and `rows` is the
    half-open range of vocabulary entries whose logits the slice gives. In a compressed file,
    which has `frames`, offset and length count raw bytes.
    """

    index: int
    kind: Kind
    number: int
    path: Path
    offset_bytes: int
    length_bytes: int
    rows: tuple[int, int] | None = None
    frames: FrameTable | None = None

    @property
    def title(self) -> str:
        """`layer 17` or `head 2`, for messages and traces."""
        return f"{self.kind.value} {self.number}"

    @property
    def slot_bytes(self) -> int:
        """Room that a slot needs for it: whole pages, so that direct reads may end on one."""
        return align_up(self.length_bytes)

    @property
    def stored(self) -> Slice:
        """The range of the file, as it is on the disk, that is read for the slice."""
        if self.frames is None:
            return self
        offset, length = self.frames.stored_range(self.offset_bytes, self.length_bytes)
        return replace(self, offset_bytes=offset, length_bytes=length, frames=None)

    def extents(self, most_bytes: int) -> tuple[Extent, ...]:
        """The slice as extents of at most `most_bytes`, in file order.

        In a compressed file they end where a frame does, wherever the slice begins, so that no
        frame is decoded twice within a slice.
        """
        end = self.offset_bytes + self.length_bytes
        base = self.offset_bytes if self.frames is None else self.frames.first_bytes
        cuts = [self.offset_bytes]
        while cuts[-1] < end:
            cuts.append(min(base + ((cuts[-1] - base) // most_bytes + 1) * most_bytes, end))
        return tuple(
            Extent(path=self.path, offset_bytes=begin, length_bytes=after - begin, title=self.title)
            for begin, after in itertools.pairwise(cuts)
        )


def pass_slices(pack: Pack, *, max_head_bytes: int | None = None) -> tuple[Slice, ...]:
    """All slices of a pass, in the order of use.

    `max_head_bytes` bounds the row ranges of lm_head (default: the largest layer's bytes).
    """
    slices = [
        Slice(
            index=index,
            kind=Kind.LAYER,
            number=index,
            path=pack.blob_path(blob),
            offset_bytes=blob.data_start_bytes,
            length_bytes=blob.raw_bytes - blob.data_start_bytes,
            frames=blob.frames,
        )
        for index, blob in enumerate(pack.manifest.layers)
    ]
    bound = max_head_bytes or max(part.slot_bytes for part in slices)
    blob, weight, num_rows = head_weight(pack)
    rows_each = _rows_each(weight.length_bytes // num_rows, num_rows, bound, blob, weight)
    row_bytes = weight.length_bytes // num_rows
    for number, first in enumerate(range(0, num_rows, rows_each)):
        last = min(first + rows_each, num_rows)
        # A row of an odd number of NF4 codes ends inside a byte: such a matrix is not cut.
        end = weight.length_bytes if last == num_rows else last * row_bytes
        slices.append(
            Slice(
                index=len(slices),
                kind=Kind.HEAD,
                number=number,
                path=pack.blob_path(blob),
                offset_bytes=weight.offset_bytes + first * row_bytes,
                length_bytes=end - first * row_bytes,
                rows=(first, last),
                frames=blob.frames,
            )
        )
    return tuple(slices)


def head_weight(pack: Pack) -> tuple[Blob, TensorEntry, int]:
    """(blob, entry, number of rows) of lm_head; of the embedding when the two are tied."""
    name = pack.manifest.model.head
    for blob in (pack.manifest.head, pack.manifest.embedding):
        for entry in blob.tensors:
            if entry.name == name:
                rows = blob.nf4[name].shape[0] if name in blob.nf4 else entry.shape[0]
                return blob, entry, rows
    raise AssertionError(f"{name} is in no blob; the manifest should not have passed validation")


def _rows_each(
    row_bytes: int, num_rows: int, bound_bytes: int, blob: Blob, weight: TensorEntry
) -> int:
    """Rows per slice: as many as fit, starting on pages and, when quantised, on nested blocks."""
    step = PAGE_BYTES // math.gcd(row_bytes, PAGE_BYTES)
    if state := blob.nf4.get(weight.name):
        out_features, in_features = state.shape
        if out_features * in_features % 2 or in_features % state.block_size:
            return num_rows
        blocks_per_row = in_features // state.block_size
        step = math.lcm(step, 256 // math.gcd(blocks_per_row, 256))
    fitting = bound_bytes // row_bytes // step * step
    return max(min(fitting, num_rows), step) if fitting else min(step, num_rows)
