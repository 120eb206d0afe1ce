"""A file of weights, read at any place by several threads at a time.

Plain reads rather than a mapping: a cold mapping is read a fault at a time, several times slower,
and a file that is truncated under a mapping kills the process where a short read is an error.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from layerpack.formats.digest import Digest
from layerpack.formats.errors import SourceError

_DIGEST_BYTES = 8 << 20
_DIGEST_READERS = 4
_READ_BYTES = 256 << 20  # below Linux' limit of 2 GiB per call


class WeightFile:
    """An open file. `close` when no thread reads any more."""

    def __init__(self, path: Path) -> None:
        """Raises SourceError if the file cannot be opened."""
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as reason:
            raise SourceError(f"{path}: cannot be read ({reason.strerror})") from reason

    def read_into(self, raw: memoryview, offset_bytes: int, *, what: str) -> None:
        """Fill `raw` from that place; waits. `what` is for errors. Raises SourceError."""
        position = 0
        try:
            while position < raw.nbytes:
                part = raw[position : position + _READ_BYTES]
                count = self._read_once(part, offset_bytes + position)
                if not count:
                    raise SourceError(
                        f"{self.path}: ends at byte {offset_bytes + position}, inside {what}; "
                        "it was truncated while it was read"
                    )
                position += count
        except OSError as reason:
            raise SourceError(f"{self.path}: cannot be read ({reason.strerror})") from reason

    def close(self) -> None:
        """Give the file back. Safe to call twice."""
        self._file.close()

    def _read_once(self, part: memoryview, offset_bytes: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [part], offset_bytes)
        with self._lock:  # Windows: the place is the file's, not the call's
            self._file.seek(offset_bytes)
            return self._file.readinto(part)


def weights_digest(path: Path, check: Callable[[], None]) -> str:
    """xxh3_128 of a whole file; as a side effect the file enters the page cache.

    Some threads read ahead: from the page cache, one alone is four times slower than the hash.
    `check` is called between pieces and may raise to end the work. Raises SourceError.
    """
    digest, file = Digest(), WeightFile(path)
    try:
        file_bytes = path.stat().st_size
        free = [memoryview(bytearray(_DIGEST_BYTES)) for _ in range(_DIGEST_READERS + 1)]
        under_way: deque[tuple[memoryview, Future[None]]] = deque()
        with ThreadPoolExecutor(_DIGEST_READERS, "layerpack-digest") as pool:

            def take_one() -> None:
                check()
                raw, future = under_way.popleft()
                future.result()
                digest.update(raw)
                assert isinstance(raw.obj, bytearray)
                free.append(memoryview(raw.obj))

            for begin in range(0, file_bytes, _DIGEST_BYTES):
                if not free:
                    take_one()
                raw = free.pop()[: file_bytes - begin]
                future = pool.submit(file.read_into, raw, begin, what="the part to digest")
                under_way.append((raw, future))
            while under_way:
                take_one()
    except OSError as reason:
        raise SourceError(f"{path}: cannot be read ({reason.strerror})") from reason
    finally:
        file.close()
    return digest.text
