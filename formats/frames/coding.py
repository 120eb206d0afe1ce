"""One frame: bytes to fewer bytes and back, with zstandard. Both release the GIL.

https://github.com/facebook/zstd/blob/dev/doc/zstd_compression_format.md is the format's own page.
"""

from __future__ import annotations

import zstandard

from layerpack.formats.errors import PackError
from layerpack.formats.frames.table import Coding
from layerpack.formats.units import align_up

Bytes = bytes | bytearray | memoryview


def zstd_library() -> str:
    """The version of zstd that compresses here: another one may give other bytes."""
    return ".".join(map(str, zstandard.ZSTD_VERSION))


def encode_frame(raw: Bytes, *, level: int, planes: bool) -> tuple[Coding, Bytes]:
    """`raw` compressed, split into its even and odd bytes first if `planes`.

    It is returned as it is where that would not save a page of the file.
    """
    source = _split(raw) if planes else raw
    stored = zstandard.ZstdCompressor(level=level).compress(source)
    if align_up(len(stored)) >= align_up(len(raw)):
        return Coding.RAW, raw
    return (Coding.PLANES if planes else Coding.ZSTD), stored


class FrameDecoder:
    """Decodes frames, for one thread. Takes no memory but for one frame's planes."""

    def __init__(self) -> None:
        self._planes = bytearray()
        self._zstd: zstandard.ZstdDecompressor | None = None
        self._window_bytes = 0

    def decode(self, stored: memoryview, coding: Coding, target: memoryview) -> None:
        """Fill `target`, a frame's raw bytes, from `stored`. Raises PackError if they differ.

        Nothing that `stored` says of itself makes this allocate more than twice `target`'s size.
        """
        if coding is Coding.RAW:
            if stored.nbytes != target.nbytes:
                raise PackError(f"holds {stored.nbytes} bytes where {target.nbytes} are stated")
            target[:] = stored
        elif coding is Coding.ZSTD:
            self._decompress(stored, target)
        else:
            if len(self._planes) < target.nbytes:
                self._planes = bytearray(target.nbytes)
            planes = memoryview(self._planes)[: target.nbytes]
            self._decompress(stored, planes)
            _join(planes, target)

    def _decompress(self, stored: memoryview, target: memoryview) -> None:
        try:
            stated = zstandard.get_frame_parameters(stored)
            if stated.content_size != target.nbytes:
                raise PackError(f"is not a frame of {target.nbytes} bytes")
            reader = self._decompressor(target.nbytes).stream_reader(stored)
            # The length is known and there is room for it: zstd writes straight into `target`.
            found = reader.readinto(target)
            if found != target.nbytes or reader.read(1):
                raise PackError(f"gives {found} bytes where {target.nbytes} are stated")
        except zstandard.ZstdError as reason:
            raise PackError(f"cannot be decompressed ({reason})") from reason

    def _decompressor(self, raw_bytes: int) -> zstandard.ZstdDecompressor:
        if self._zstd is None or self._window_bytes < raw_bytes:
            # Bounds what a frame that lies about its window can make zstd allocate.
            self._window_bytes = max(raw_bytes, _LEAST_WINDOW_BYTES)
            self._zstd = zstandard.ZstdDecompressor(max_window_size=self._window_bytes)
        return self._zstd


_LEAST_WINDOW_BYTES = 1024


def _split(raw: Bytes) -> bytes:
    import numpy as np

    values = np.frombuffer(raw, dtype=np.uint8)
    return np.concatenate((values[0::2], values[1::2])).tobytes()


def _join(planes: memoryview, target: memoryview) -> None:
    import numpy as np

    source, half = np.frombuffer(planes, dtype=np.uint8), (planes.nbytes + 1) // 2
    pairs = planes.nbytes // 2
    if pairs:
        # As 16-bit integers: three times as fast as two strided copies.
        words = np.frombuffer(target[: 2 * pairs], dtype="<u2")
        np.left_shift(source[half:], 8, out=words, dtype=np.uint16, casting="unsafe")
        np.bitwise_or(words, source[:pairs], out=words)
    if planes.nbytes % 2:
        target[-1] = planes[half - 1]
