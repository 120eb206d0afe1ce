"""Where the frames of a compressed blob lie: facts from the manifest, checked, and nothing else.

A blob's bytes (those of the plain safetensors file, called raw) are cut into frames: the header
alone, then `frame_bytes` each, the last one shorter. So what is read during a pass, which begins
behind the header, begins with a frame. Each frame is stored by itself, from a page on, with zeros
up to the next page: direct reads get single frames, for 0.1 % of the space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from layerpack.formats.units import MIB, PAGE_BYTES, align_up

FRAME_BYTES = 2 * MIB
"""What this version cuts to: few enough frames for a table, small enough for single rows."""
MAX_FRAME_BYTES = 64 * MIB
FRAMES_SUFFIX = ".zst"


class Coding(str, Enum):
    """How a frame is stored."""

    RAW = "r"
    ZSTD = "z"
    PLANES = "p"
    """zstd of all bytes at even places, then all at odd ones: 16-bit floats' exponents together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame: `stored_bytes` from `offset_bytes` of the file are the raw bytes from
    `raw_offset_bytes` on, `raw_bytes` of them."""

    offset_bytes: int
    stored_bytes: int
    raw_offset_bytes: int
    raw_bytes: int
    coding: Coding


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameTable:
    """All frames of a blob. `raw_digest` is that of the plain file. Make one with `build`."""

    raw_bytes: int
    raw_digest: str
    frame_bytes: int
    frames: tuple[Frame, ...]

    @classmethod
    def build(
        cls,
        *,
        first_bytes: int,
        frame_bytes: int,
        raw_bytes: int,
        raw_digest: str,
        stored_bytes: Sequence[int],
        coding: str,
    ) -> FrameTable:
        """From the lengths and codings alone; `first_bytes` is the raw length of the header.

        Raises ValueError, with a short reason, if they do not add up.
        """
        if frame_bytes % PAGE_BYTES or not PAGE_BYTES <= frame_bytes <= MAX_FRAME_BYTES:
            raise ValueError(f"frames of {frame_bytes} bytes are not supported")
        if not 0 < first_bytes < raw_bytes:
            raise ValueError("the header takes all of the blob")
        if first_bytes > MAX_FRAME_BYTES:
            raise ValueError(f"a header of {first_bytes} bytes is not supported")
        count = 1 - (first_bytes - raw_bytes) // frame_bytes
        if not len(stored_bytes) == len(coding) == count:
            raise ValueError(f"{len(stored_bytes)} lengths, {len(coding)} codings, {count} frames")
        frames, offset, raw_offset = [], 0, 0
        for index, (stored, letter) in enumerate(zip(stored_bytes, coding, strict=True)):
            raw = min(frame_bytes if index else first_bytes, raw_bytes - raw_offset)
            if letter not in _CODINGS:
                raise ValueError(f"frame {index} has the unknown coding {letter!r}")
            if not (stored == raw if letter == Coding.RAW.value else 0 < stored < raw):
                raise ValueError(f"frame {index} of {raw} bytes is stored in {stored}")
            frames.append(
                Frame(
                    offset_bytes=offset,
                    stored_bytes=stored,
                    raw_offset_bytes=raw_offset,
                    raw_bytes=raw,
                    coding=Coding(letter),
                )
            )
            offset, raw_offset = align_up(offset + stored), raw_offset + raw
        return cls(
            raw_bytes=raw_bytes,
            raw_digest=raw_digest,
            frame_bytes=frame_bytes,
            frames=tuple(frames),
        )

    @property
    def first_bytes(self) -> int:
        """Raw length of the first frame, the header: where the others are counted from."""
        return self.frames[0].raw_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the compressed file."""
        last = self.frames[-1]
        return align_up(last.offset_bytes + last.stored_bytes)

    def covering(self, raw_offset_bytes: int, length_bytes: int) -> tuple[Frame, ...]:
        """The frames that hold a range of raw bytes; it must lie inside the blob."""
        first = self._place(raw_offset_bytes)
        return self.frames[first : self._place(raw_offset_bytes + length_bytes - 1) + 1]

    def stored_range(self, raw_offset_bytes: int, length_bytes: int) -> tuple[int, int]:
        """(offset, length) in the compressed file of the frames that hold a range of raw bytes."""
        covering = self.covering(raw_offset_bytes, length_bytes)
        first, last = covering[0], covering[-1]
        return first.offset_bytes, last.offset_bytes + last.stored_bytes - first.offset_bytes

    def _place(self, raw_offset_bytes: int) -> int:
        return (
            1 + (raw_offset_bytes - self.first_bytes) // self.frame_bytes
            if (raw_offset_bytes >= self.first_bytes)
            else 0
        )


_CODINGS = tuple(coding.value for coding in Coding)
