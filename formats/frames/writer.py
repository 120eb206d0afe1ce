"""A blob's bytes in order to frames in order, compressed by several threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from layerpack.formats.blob.layout import BlobLayout
from layerpack.formats.digest import Digest
from layerpack.formats.frames.coding import Bytes, encode_frame
from layerpack.formats.frames.table import Coding, FrameTable
from layerpack.formats.units import align_up

_TWO_BYTE_FLOATS = ("BF16", "F16")


class FrameWriter:
    """Give raw bytes to `add`, then call `finish`; write what both yield, in that order.

    A few frames per core are held in memory. `close` ends the threads in any case. After `finish`
    `table` says where the frames lie.
    """

    def __init__(self, layout: BlobLayout, *, level: int, frame_bytes: int) -> None:
        self._layout, self._level, self._frame_bytes = layout, level, frame_bytes
        self._workers = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="layerpack-zstd")
        self._waiting: deque[Future[tuple[Coding, Bytes]]] = deque()
        self._raw_digest = Digest()
        self._current = bytearray()
        self._begin = 0  # of the current frame, among the raw bytes
        self._stored_bytes: list[int] = []
        self._coding: list[str] = []
        self.table: FrameTable | None = None

    def add(self, raw: memoryview) -> Iterator[Bytes]:
        """Take the next raw bytes; what is ready to be written."""
        self._raw_digest.update(raw)
        while raw.nbytes:
            left = self._end() - self._begin - len(self._current)
            self._current += raw[:left]
            raw = raw[left:]
            if self._begin + len(self._current) == self._end():
                self._compress()
                while len(self._waiting) > 2 * self._workers:
                    yield from self._next()

    def finish(self) -> Iterator[Bytes]:
        """All the rest."""
        while self._waiting:
            yield from self._next()
        self.table = FrameTable.build(
            first_bytes=self._layout.data_start_bytes,
            frame_bytes=self._frame_bytes,
            raw_bytes=self._layout.file_bytes,
            raw_digest=self._raw_digest.text,
            stored_bytes=self._stored_bytes,
            coding="".join(self._coding),
        )

    def close(self) -> None:
        """End the threads; what was not yielded is lost."""
        self._pool.shutdown(cancel_futures=True)

    def _end(self) -> int:
        """Where the current frame ends."""
        if not self._begin:
            return self._layout.data_start_bytes
        return min(self._begin + self._frame_bytes, self._layout.file_bytes)

    def _compress(self) -> None:
        raw, end = self._current, self._end()
        planes = self._two_byte_bytes(self._begin, end) > (end - self._begin) // 2
        self._waiting.append(self._pool.submit(encode_frame, raw, level=self._level, planes=planes))
        self._current, self._begin = bytearray(), end

    def _two_byte_bytes(self, begin: int, end: int) -> int:
        """How many of the raw bytes from `begin` to `end` are 16-bit floats."""
        return sum(
            max(0, min(end, entry.end_bytes) - max(begin, entry.offset_bytes))
            for entry in self._layout.tensors
            if entry.dtype in _TWO_BYTE_FLOATS
        )

    def _next(self) -> Iterator[Bytes]:
        coding, stored = self._waiting.popleft().result()
        self._stored_bytes.append(len(stored))
        self._coding.append(coding.value)
        yield stored
        if padding := align_up(len(stored)) - len(stored):
            yield bytes(padding)
