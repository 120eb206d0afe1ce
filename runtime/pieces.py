"""What one read of a slice is: small enough that many are under way at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerpack.runtime.slices import Slice


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
    """The slice as pieces of at most `piece_bytes`, in file order."""
    end = part.offset_bytes + part.length_bytes
    return tuple(
        Piece(
            path=part.path,
            offset_bytes=offset,
            length_bytes=min(piece_bytes, end - offset),
            title=part.title,
        )
        for offset in range(part.offset_bytes, end, piece_bytes)
    )
