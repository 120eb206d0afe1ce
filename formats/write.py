"""Writing a file front to back: past the page cache, or through it.

A pack is larger than what it is read from at any one time: written through the page cache it would
push that out, and the system's work for each page costs more than the disk's (five times slower on
one machine). Both outputs have one signature; `open_output` picks by asking the file system.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from layerpack.formats.units import PAGE_BYTES, align_up

BUFFER_BYTES = 8 << 20
_NUM_BUFFERS = 3  # one being filled, one being written, one waiting
_BEGIN_BYTES = 32 << 20
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


class Output(Protocol):
    """A new file that is appended to. One thread at a time."""

    direct: bool

    def write(self, data: memoryview) -> None:
        """Append; `data` may be changed afterwards. Raises OSError, of an earlier write perhaps."""

    def finish(self) -> None:
        """Wait until every byte is on the disk. Raises OSError."""

    def close(self) -> None:
        """Close the file, finished or not. Safe to call twice; raises nothing."""


def open_output(path: Path, *, direct: bool | None = None) -> Output:
    """A DirectOutput where `path` can be written so, else a BufferedOutput; the file is empty.

    `direct` True or False forces one. Raises OSError.
    """
    if direct is False or not hasattr(os, "O_DIRECT"):
        return BufferedOutput(path)
    try:
        return DirectOutput(path)
    except OSError as reason:
        if direct or reason.errno not in _NOT_SUPPORTED:
            raise
        return BufferedOutput(path)


class BufferedOutput:
    """Writes through the page cache: works everywhere."""

    direct = False

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self._begun_bytes = 0

    def write(self, data: memoryview) -> None:
        """Append. Raises OSError."""
        for begin in range(0, data.nbytes, _BEGIN_BYTES):
            piece = data[begin : begin + _BEGIN_BYTES]
            while piece.nbytes:
                piece = piece[self._file.write(piece) :]
            self._begin_writeback()

    def finish(self) -> None:
        """Wait until every byte is on the disk. Raises OSError."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _begin_writeback(self) -> None:
        """Let the disk begin now: by itself it would idle until `finish`.

        Advice that pages are not needed starts writing them, and drops none that is not written.
        """
        end_bytes = self._file.tell()
        length_bytes = end_bytes - self._begun_bytes
        if length_bytes < _BEGIN_BYTES or not hasattr(os, "posix_fadvise"):
            return
        os.posix_fadvise(
            self._file.fileno(), self._begun_bytes, length_bytes, os.POSIX_FADV_DONTNEED
        )
        self._begun_bytes = end_bytes


class DirectOutput:
    """Writes whole pages with O_DIRECT, in a thread of its own, from buffers that it fills in turn.

    The file's last page is padded, and cut off by `finish`.
    """

    direct = True

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o666)
        try:
            # Some file systems open so and then refuse to write.
            _write_at(self._descriptor, memoryview(mmap.mmap(-1, PAGE_BYTES)), 0)
            os.ftruncate(self._descriptor, 0)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._pool = ThreadPoolExecutor(1, "layerpack-output")
        self._buffers = [memoryview(mmap.mmap(-1, BUFFER_BYTES)) for _ in range(_NUM_BUFFERS)]
        self._current, self._filled = 0, 0
        self._sent_bytes = 0
        self._pending: deque[Future[None]] = deque()

    def write(self, data: memoryview) -> None:
        """Append. Raises OSError, of an earlier write perhaps."""
        import numpy as np  # its copies let other threads run; `inspect` does without it

        source = np.frombuffer(data, np.uint8)
        while source.size:
            count = min(source.size, BUFFER_BYTES - self._filled)
            target = self._buffers[self._current][self._filled : self._filled + count]
            np.copyto(np.frombuffer(target, np.uint8), source[:count])
            source = source[count:]
            self._filled += count
            if self._filled == BUFFER_BYTES:
                self._send(BUFFER_BYTES)

    def finish(self) -> None:
        """Wait until every byte is on the disk. Raises OSError."""
        file_bytes = self._sent_bytes + self._filled
        if self._filled:
            padded = align_up(self._filled)
            self._buffers[self._current][self._filled : padded] = bytes(padded - self._filled)
            self._send(padded)
        while self._pending:
            self._pending.popleft().result()
        os.ftruncate(self._descriptor, file_bytes)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Wait for the write under way and close the file. Safe to call twice."""
        self._pool.shutdown(cancel_futures=True)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _send(self, length_bytes: int) -> None:
        buffer = self._buffers[self._current][:length_bytes]
        self._pending.append(
            self._pool.submit(_write_at, self._descriptor, buffer, self._sent_bytes)
        )
        self._sent_bytes += length_bytes
        self._current, self._filled = (self._current + 1) % _NUM_BUFFERS, 0
        if len(self._pending) == _NUM_BUFFERS:  # the oldest of them is the buffer to fill next
            self._pending.popleft().result()


def _write_at(descriptor: int, data: memoryview, offset_bytes: int) -> None:
    """All of `data`, whole pages. Raises OSError."""
    done = 0
    while done < data.nbytes:
        count = os.pwrite(descriptor, data[done:], offset_bytes + done)
        # What was written of a page is written again: the next write must begin on one.
        count -= count % PAGE_BYTES
        if not count:
            raise OSError(errno.EIO, "the disk took less than a page")
        done += count
