"""Bytes of blobs for uses outside the stream, whether the blob is plain or compressed.

Plain bytes are mapped: only what is used is read, and the page cache holds it. Compressed ones
cannot be; they are decoded into memory, wholly where they are used in every pass, row by row where
they are not.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from layerpack.formats.blob.header import TensorEntry
from layerpack.formats.frames.table import Frame, FrameTable
from layerpack.formats.manifest.facts import Blob
from layerpack.formats.pack import Pack, raw_reader
from layerpack.formats.read import BufferedReader, Reader
from layerpack.formats.units import MIB
from layerpack.runtime.core.dtypes import TORCH_DTYPES
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.stream.host import read_slice
from layerpack.runtime.stream.mapped import map_bytes, map_slice

_THREADS = 8
_KEPT_BYTES = 64 * MIB
_IDS_AT_ONCE = 16


def tensor_bytes(pack: Pack, blob: Blob, entry: TensorEntry) -> torch.Tensor:
    """One tensor's bytes (uint8, CPU): a read-only mapping, or decoded. Raises StreamError."""
    path = pack.blob_path(blob)
    if blob.frames is None:
        return map_bytes(path, entry.offset_bytes, entry.length_bytes)
    reader = raw_reader(pack, BufferedReader())
    try:
        return _read(reader, path, entry.offset_bytes, entry.length_bytes)
    finally:
        reader.close()


def slices_in_memory(
    slices: Iterable[Slice], reader: Reader, *, watchdog_s: float, cancelled: threading.Event
) -> dict[int, torch.Tensor]:
    """Each slice's bytes (uint8, CPU) by index, mapped or decoded; blocks.

    `reader` gives raw bytes. Raises StreamError, once `cancelled` is set as well.
    """
    tensors = {}
    for part in slices:
        if part.frames is None:
            tensors[part.index] = map_slice(part)
            continue
        tensors[part.index] = torch.empty(part.length_bytes, dtype=torch.uint8)
        whole = memoryview(tensors[part.index].numpy().data)
        read_slice(part, whole, reader, watchdog_s=watchdog_s, cancelled=cancelled)
    return tensors


class FramedMatrix:
    """Rows of a compressed matrix, asked for as a tensor's are: `matrix[ids]`.

    A pass needs few rows of an embedding of gigabytes, so frames are decoded as they are needed (a
    few milliseconds each) and the last of them kept, 64 MiB in all: common tokens come again and
    again, and the page cache holds what was read before. Decoding all of it once would take from a
    laptop memory that whole layers could have.
    """

    def __init__(self, path: Path, table: FrameTable, entry: TensorEntry, reader: Reader) -> None:
        self.shape = torch.Size(entry.shape)
        self.dtype = TORCH_DTYPES[entry.dtype]
        self._path, self._table, self._entry, self._reader = path, table, entry, reader
        self._row_bytes = entry.length_bytes // entry.shape[0]
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()

    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (1-D, on the CPU), in their order. Raises StreamError."""
        unique, places = torch.unique(ids, return_inverse=True)
        rows = torch.empty((unique.numel(), self._row_bytes), dtype=torch.uint8)
        wanted = unique.tolist()
        for first in range(0, len(wanted), _IDS_AT_ONCE):
            some = wanted[first : first + _IDS_AT_ONCE]
            frames = {f.offset_bytes: f for row in some for f in self._frames_of(row)}
            self._bring(list(frames.values()))
            for place, row in enumerate(some, first):
                self._fill(rows[place], row)
            self._forget()
        return rows.view(self.dtype)[places]

    def _begin(self, row: int) -> int:
        if not 0 <= row < self.shape[0]:
            raise IndexError(f"row {row} of a matrix of {self.shape[0]}")
        return self._entry.offset_bytes + row * self._row_bytes

    def _frames_of(self, row: int) -> tuple[Frame, ...]:
        return self._table.covering(self._begin(row), self._row_bytes)

    def _bring(self, frames: list[Frame]) -> None:
        missing = []
        for frame in frames:
            if frame.offset_bytes in self._kept:
                self._kept.move_to_end(frame.offset_bytes)
            else:
                missing.append(frame)
        if len(missing) == 1:  # a step of generation: no threads for it
            self._kept[missing[0].offset_bytes] = self._decoded(missing[0])
        elif missing:
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="layerpack-decode") as pool:
                for frame, raw in zip(missing, pool.map(self._decoded, missing), strict=True):
                    self._kept[frame.offset_bytes] = raw

    def _decoded(self, frame: Frame) -> torch.Tensor:
        return _read(self._reader, self._path, frame.raw_offset_bytes, frame.raw_bytes)

    def _fill(self, target: torch.Tensor, row: int) -> None:
        begin = self._begin(row)
        end = begin + self._row_bytes
        for frame in self._frames_of(row):
            first = max(begin, frame.raw_offset_bytes)
            last = min(end, frame.raw_offset_bytes + frame.raw_bytes)
            raw = self._kept[frame.offset_bytes]
            target[first - begin : last - begin] = raw[
                first - frame.raw_offset_bytes : last - frame.raw_offset_bytes
            ]

    def _forget(self) -> None:
        while len(self._kept) * self._table.frame_bytes > _KEPT_BYTES:
            self._kept.popitem(last=False)


def _read(reader: Reader, path: Path, offset_bytes: int, length_bytes: int) -> torch.Tensor:
    tensor = torch.empty(length_bytes, dtype=torch.uint8)
    if length_bytes:
        reader.read(path, offset_bytes, length_bytes, memoryview(tensor.numpy().data))
    return tensor
