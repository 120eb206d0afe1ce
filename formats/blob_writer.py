"""Writing one blob: header first, tensors in file order, the digest taken on the way by a thread.

With a zstd level the same bytes go through a FrameWriter before they reach the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from layerpack.formats.blob.header import encode_header
from layerpack.formats.blob.layout import BlobLayout
from layerpack.formats.digest import Digest
from layerpack.formats.disk import PARTIAL_SUFFIX
from layerpack.formats.frames.coding import Bytes
from layerpack.formats.frames.table import FRAME_BYTES, FrameTable
from layerpack.formats.frames.writer import FrameWriter
from layerpack.formats.write import BUFFER_BYTES, open_output


class BlobWriter:
    """A file that gets its name only when every tensor is in it and on the disk.

    Use as a context manager; call `write` with each tensor's bytes, in the layout's order, in as
    many pieces as is convenient. Leaving the block without an error checks that all is there,
    fsyncs, renames, and sets `digest`; leaving it with one removes the partial file. OSError
    (a full disk among them) passes through. With `zstd_level` the file is compressed, and `frames`
    is set as well; `digest` is that of the file as it is stored. `direct` False leaves the file in
    the page cache, for whoever reads it at once (see write.py).
    """

    def __init__(
        self,
        path: Path,
        layout: BlobLayout,
        *,
        zstd_level: int | None = None,
        direct: bool | None = None,
    ) -> None:
        self.digest: str | None = None
        self.frames: FrameTable | None = None
        self._direct = direct
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._layout = layout
        self._framing: FrameWriter | None = None
        if zstd_level is not None:
            self._framing = FrameWriter(layout, level=zstd_level, frame_bytes=FRAME_BYTES)
        self._running = Digest()
        self._position = 0
        self._next = 0

    def __enter__(self) -> BlobWriter:
        try:
            self._output = open_output(self._partial, direct=self._direct)
        except BaseException:
            self._partial.unlink(missing_ok=True)
            raise
        self._hasher = ThreadPoolExecutor(1, "layerpack-digest")
        start = self._layout.data_start_bytes
        try:
            self._append(memoryview(encode_header(self._layout.tensors, data_start_bytes=start)))
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Append bytes of tensor `name`: all of it, or the next piece of it."""
        view = memoryview(data).cast("B")
        if not view.nbytes:
            return
        while self._layout.tensors[self._next].end_bytes == self._position:
            self._next += 1
        entry = self._layout.tensors[self._next]
        if entry.name != name or self._position + view.nbytes > entry.end_bytes:
            raise ValueError(f"{view.nbytes} bytes of {name} where {entry.name} is expected")
        self._append(view)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            if self._position != self._layout.file_bytes:
                raise ValueError(
                    f"{self._path.name}: {self._position} bytes written, "
                    f"its layout has {self._layout.file_bytes}"
                )
            if self._framing is not None:
                self._store(self._framing.finish())
                self._framing.close()
                self.frames = self._framing.table
            self._output.finish()
            self._output.close()
            self._hasher.shutdown()
            os.rename(self._partial, self._path)
        except BaseException:
            self._discard()
            raise
        self.digest = self._running.text

    def _append(self, view: memoryview) -> None:
        self._store([view] if self._framing is None else self._framing.add(view))
        self._position += view.nbytes

    def _store(self, parts: Iterable[Bytes]) -> None:
        for part in parts:
            view = memoryview(part)
            for begin in range(0, view.nbytes, BUFFER_BYTES):  # what a cache holds for both
                piece = view[begin : begin + BUFFER_BYTES]
                hashed = self._hasher.submit(self._running.update, piece)
                try:
                    self._output.write(piece)
                finally:
                    hashed.result()  # the caller may change the bytes afterwards

    def _discard(self) -> None:
        if self._framing is not None:
            self._framing.close()
        self._output.close()
        self._hasher.shutdown()
        self._partial.unlink(missing_ok=True)
