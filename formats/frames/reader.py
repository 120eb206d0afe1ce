"""Raw bytes out of compressed blobs, by the signature of any Reader: offsets are raw offsets."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from layerpack.formats.errors import PackError, StreamError
from layerpack.formats.frames.coding import FrameDecoder
from layerpack.formats.frames.table import Frame, FrameTable
from layerpack.formats.read import Reader
from layerpack.formats.units import MIB, align_up

_READ_BYTES = 4 * MIB
"""What is read at once, unless a single frame is larger: enough for a disk's full speed."""


class FrameReader:
    """Reads frames through `inner` and decodes them straight into the caller's buffer.

    A path without a table is a plain file.
    Frames that a range covers only in part are decoded aside: ranges that begin and end with
    frames are the fast way. Each thread has its own scratch memory, of about 4 MiB.
    """

    def __init__(self, inner: Reader, tables: Mapping[Path, FrameTable]) -> None:
        self.direct = inner.direct
        self._inner, self._tables = inner, tables
        self._local = threading.local()

    def read(self, path: Path, offset_bytes: int, length_bytes: int, buffer: memoryview) -> None:
        """Fill `buffer[:length_bytes]` from raw `offset_bytes`; blocks. Raises StreamError."""
        if not length_bytes:
            return
        if (table := self._tables.get(path)) is None:  # a plain file among them
            self._inner.read(path, offset_bytes, length_bytes, buffer)
            return
        if offset_bytes + length_bytes > table.raw_bytes:
            raise StreamError(
                f"{path}: holds {table.raw_bytes} bytes, wanted {length_bytes} from {offset_bytes}"
            )
        scratch = self._scratch()
        for batch in _batches(table.covering(offset_bytes, length_bytes)):
            first, last = batch[0], batch[-1]
            stored_bytes = last.offset_bytes + last.stored_bytes - first.offset_bytes
            stored = scratch.stored(stored_bytes)
            self._inner.read(path, first.offset_bytes, stored_bytes, stored)
            for frame in batch:
                begin = frame.offset_bytes - first.offset_bytes
                try:
                    scratch.decode(
                        frame,
                        stored[begin : begin + frame.stored_bytes],
                        buffer[:length_bytes],
                        frame.raw_offset_bytes - offset_bytes,
                    )
                except PackError as error:
                    raise StreamError(
                        f"{path}: the frame at byte {frame.offset_bytes} {error}; "
                        "run `layerpack verify`"
                    ) from error

    def close(self) -> None:
        """Close every file."""
        self._inner.close()

    def _scratch(self) -> _Scratch:
        scratch: _Scratch | None = getattr(self._local, "scratch", None)
        if scratch is None:
            scratch = self._local.scratch = _Scratch()
        return scratch


class _Scratch:
    """One thread's memory."""

    def __init__(self) -> None:
        self._decoder = FrameDecoder()
        self._stored = memoryview(b"")
        self._aside = bytearray()

    def stored(self, length_bytes: int) -> memoryview:
        """Memory that begins on a page and reaches to the next one, as direct reads need."""
        if self._stored.nbytes < length_bytes:
            self._stored = memoryview(mmap.mmap(-1, align_up(length_bytes)))
        return self._stored

    def decode(self, frame: Frame, stored: memoryview, target: memoryview, place: int) -> None:
        """Put the frame at `place` of `target`, as much of it as lies inside."""
        end = place + frame.raw_bytes
        if place >= 0 and end <= target.nbytes:
            self._decoder.decode(stored, frame.coding, target[place:end])
            return
        if len(self._aside) < frame.raw_bytes:
            self._aside = bytearray(frame.raw_bytes)
        aside = memoryview(self._aside)[: frame.raw_bytes]
        self._decoder.decode(stored, frame.coding, aside)
        begin, end = max(place, 0), min(end, target.nbytes)
        target[begin:end] = aside[begin - place : end - place]


def _batches(frames: Sequence[Frame]) -> Iterator[list[Frame]]:
    """Runs of frames that one read brings."""
    batch: list[Frame] = []
    for frame in frames:
        if batch and frame.offset_bytes + frame.stored_bytes - batch[0].offset_bytes > _READ_BYTES:
            yield batch
            batch = []
        batch.append(frame)
    yield batch
