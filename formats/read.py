"""Reading byte ranges of blobs into host buffers: past the page cache, or through it.

Both readers have one signature; `open_reader` picks by asking the file system, never the platform.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Protocol

from layerpack.formats.errors import StreamError
from layerpack.formats.units import PAGE_BYTES, align_up


class Reader(Protocol):
    """Fills buffers from files. Threads may share one."""

    direct: bool

    def read(self, path: Path, offset_bytes: int, length_bytes: int, buffer: memoryview) -> None:
        """Fill `buffer[:length_bytes]`; blocks, with the GIL released. Raises StreamError."""

    def close(self) -> None:
        """Close every file."""


class _Files:
    """Files by path, opened once with the same flags."""

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._descriptors: dict[Path, int] = {}

    def descriptor(self, path: Path) -> int:
        # Two threads may both open a file; setdefault keeps one and the other is closed.
        if (known := self._descriptors.get(path)) is not None:
            return known
        opened = os.open(path, self._flags)
        kept = self._descriptors.setdefault(path, opened)
        if kept != opened:
            os.close(opened)
        return kept

    def close(self) -> None:
        descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            os.close(descriptor)


class BufferedReader:
    """Reads through the page cache: works everywhere, needs no alignment."""

    direct = False

    def __init__(self) -> None:
        self._files = _Files(os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def read(self, path: Path, offset_bytes: int, length_bytes: int, buffer: memoryview) -> None:
        """Fill `buffer[:length_bytes]`; blocks. Raises StreamError."""
        _read_all(self._files, path, offset_bytes, length_bytes, buffer[:length_bytes], 1)

    def close(self) -> None:
        """Close every file."""
        self._files.close()


class DirectReader:
    """Reads with O_DIRECT: the device moves bytes straight into `buffer`, no page cache.

    `offset_bytes` and the buffer's address must be multiples of 4096, and the buffer must reach
    to the page after `length_bytes`: whole pages are read.
    """

    direct = True

    def __init__(self) -> None:
        self._files = _Files(os.O_RDONLY | os.O_DIRECT)

    def read(self, path: Path, offset_bytes: int, length_bytes: int, buffer: memoryview) -> None:
        """Fill `buffer[:length_bytes]`; blocks. Raises StreamError."""
        whole = buffer[: align_up(length_bytes)]
        _read_all(self._files, path, offset_bytes, length_bytes, whole, PAGE_BYTES)

    def close(self) -> None:
        """Close every file."""
        self._files.close()


def open_reader(sample: Path, *, direct: bool | None = None) -> Reader:
    """A DirectReader where `sample` can be read so, else a BufferedReader.

    `direct` True or False forces one. Raises StreamError where a forced direct read cannot be.
    """
    if direct is False:
        return BufferedReader()
    if reason := _why_not_direct(sample):
        if direct:
            raise StreamError(f"{sample}: direct reads are not possible here ({reason})")
        return BufferedReader()
    return DirectReader()


def _why_not_direct(sample: Path) -> str | None:
    import mmap

    if not hasattr(os, "O_DIRECT"):
        return "no O_DIRECT on this system"
    reader = DirectReader()
    try:
        # An anonymous mapping is page-aligned, as the ring's slots are.
        reader.read(sample, 0, 1, memoryview(mmap.mmap(-1, PAGE_BYTES)))
    except StreamError as error:
        return str(error.__cause__ or error)
    finally:
        reader.close()
    return None


def _read_all(
    files: _Files,
    path: Path,
    offset_bytes: int,
    length_bytes: int,
    buffer: memoryview,
    alignment_bytes: int,
) -> None:
    done = 0
    try:
        descriptor = files.descriptor(path)
        while done < length_bytes:
            count = os.preadv(descriptor, [buffer[done:]], offset_bytes + done)
            # A direct read that stops inside a page has met the end of the file.
            if count <= 0 or (done + count < length_bytes and count % alignment_bytes):
                raise StreamError(
                    f"{path}: ends at byte {offset_bytes + done + max(count, 0)}, wanted "
                    f"{length_bytes} bytes from {offset_bytes}; run `layerpack verify`"
                )
            done += count
    except OSError as reason:
        name = errno.errorcode.get(reason.errno or 0, "?")
        raise StreamError(
            f"{path}: reading {length_bytes} bytes from {offset_bytes} failed "
            f"({reason.strerror}, {name}); check the disk"
        ) from reason
