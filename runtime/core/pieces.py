"""What one read of a slice is: small enough that many are under way at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from layerpack.runtime.core.slices import Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`length_bytes` from `offset_bytes` of the file at `path`; `title` names the slice."""

    path: Path
    offset_bytes: int
    length_bytes: int
    title: str

    @property
    def end_bytes(self) -> int:
        """The first byte after it."""
        return self.offset_bytes + self.length_bytes


def split(part: Slice, piece_bytes: int) -> tuple[Piece, ...]:
    """The slice as pieces of at most `piece_bytes`, in file order.

    In a compressed file they end where a frame does, wherever the slice begins, so that no frame
    is decoded twice within a slice.
    """
    end = part.offset_bytes + part.length_bytes
    base = part.offset_bytes if part.frames is None else part.frames.first_bytes
    cuts = [part.offset_bytes]
    while cuts[-1] < end:
        cuts.append(min(base + ((cuts[-1] - base) // piece_bytes + 1) * piece_bytes, end))
    return tuple(
        Piece(path=part.path, offset_bytes=begin, length_bytes=after - begin, title=part.title)
        for begin, after in itertools.pairwise(cuts)
    )
