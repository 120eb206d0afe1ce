"""Writing one blob: header first, tensors in file order, the digest taken on the way.

With a zstd level the same bytes go through a FrameWriter before they reach the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from layerpack.formats.digest import Digest
from layerpack.formats.frame_table import FRAME_BYTES, FrameTable
from layerpack.formats.frame_writer import FrameWriter
from layerpack.formats.frames import Bytes
from layerpack.formats.header import encode_header
from layerpack.formats.layout import BlobLayout

PARTIAL_SUFFIX = ".partial"
_WRITE_BYTES = 32 << 20
_WORTH_A_THREAD_BYTES = 1 << 20


class BlobWriter:
    """A file that gets its name only when every tensor is in it and on the disk.

    Use as a context manager; call `write` with each tensor's bytes, in the layout's order, in as
    many pieces as is convenient. Leaving the block without an error checks that all is there,
    fsyncs, renames, and sets `digest`; leaving it with one removes the partial file. OSError
    (a full disk among them) passes through. With `zstd_level` the file is compressed, and `frames`
    is set as well; `digest` is that of the file as it is stored.
    """

    def __init__(self, path: Path, layout: BlobLayout, *, zstd_level: int | None = None) -> None:
        self.digest: str | None = None
        self.frames: FrameTable | None = None
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._layout = layout
        self._framing: FrameWriter | None = None
        if zstd_level is not None:
            self._framing = FrameWriter(layout, level=zstd_level, frame_bytes=FRAME_BYTES)
        self._running = Digest()
        self._digesting = ThreadPoolExecutor(1, "layerpack-digest")
        self._position = 0
        self._begun_bytes = 0
        self._next = 0

    def __enter__(self) -> BlobWriter:
        self._file = open(self._partial, "wb", buffering=0)
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
            self._digesting.shutdown()
            os.fsync(self._file.fileno())
            self._file.close()
            os.rename(self._partial, self._path)
        except BaseException:
            self._discard()
            raise
        self.digest = self._running.text

    def _append(self, view: memoryview) -> None:
        self._store([view] if self._framing is None else self._framing.add(view))
        self._position += view.nbytes
        self._begin_writeback()

    def _begin_writeback(self) -> None:
        """Let the disk begin now: by itself it would idle until the fsync at the end.

        Advice that pages are not needed starts writing them, and drops none that is not written.
        """
        begun_bytes, end_bytes = self._begun_bytes, self._file.tell()
        if end_bytes - begun_bytes < _WRITE_BYTES or not hasattr(os, "posix_fadvise"):
            return
        length_bytes = end_bytes - begun_bytes
        os.posix_fadvise(self._file.fileno(), begun_bytes, length_bytes, os.POSIX_FADV_DONTNEED)
        self._begun_bytes = end_bytes

    def _store(self, parts: Iterable[Bytes]) -> None:
        for part in parts:
            view = memoryview(part)
            for begin in range(0, view.nbytes, _WRITE_BYTES):
                self._store_piece(view[begin : begin + _WRITE_BYTES])

    def _store_piece(self, piece: memoryview) -> None:
        if piece.nbytes < _WORTH_A_THREAD_BYTES:
            self._running.update(piece)
            self._write_all(piece)
            return
        # Either takes about as long as the other, and neither holds the interpreter.
        digested = self._digesting.submit(self._running.update, piece)
        try:
            self._write_all(piece)
        finally:
            digested.result()  # the caller may use its memory again

    def _write_all(self, piece: memoryview) -> None:
        while piece.nbytes:
            piece = piece[self._file.write(piece) :]

    def _discard(self) -> None:
        self._digesting.shutdown()
        if self._framing is not None:
            self._framing.close()
        self._file.close()
        self._partial.unlink(missing_ok=True)
