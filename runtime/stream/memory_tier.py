"""Slices and tensors in host memory for a CPU to compute with: mapped, or decoded.

Plain bytes are mapped: only what is used is read, and the page cache holds it. Compressed ones
are decoded into memory, as each pass uses them wholly.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from layerpack.formats.blob.header import TensorEntry
from layerpack.formats.manifest.facts import Blob
from layerpack.formats.pack import Pack, raw_reader
from layerpack.formats.read import BufferedReader, Reader
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.stream.host_tier import read_slice
from layerpack.runtime.stream.mapped import map_bytes, map_slice


def load_memory(
    slices: Iterable[Slice], reader: Reader, patience: Patience
) -> dict[int, torch.Tensor]:
    """Each slice's bytes (uint8, CPU) by index; waits. `reader` gives raw bytes.

    Raises StreamError, CancelledError.
    """
    tensors = {}
    for part in slices:
        if part.frames is None:
            tensors[part.index] = map_slice(part)
            continue
        tensors[part.index] = torch.empty(part.length_bytes, dtype=torch.uint8)
        read_slice(part, memoryview(tensors[part.index].numpy().data), reader, patience)
    return tensors


def tensor_bytes(pack: Pack, blob: Blob, entry: TensorEntry) -> torch.Tensor:
    """One tensor's bytes (uint8, CPU): a read-only mapping, or decoded. Raises StreamError."""
    path = pack.blob_path(blob)
    if blob.frames is None:
        return map_bytes(path, entry.offset_bytes, entry.length_bytes)
    tensor = torch.empty(entry.length_bytes, dtype=torch.uint8)
    reader = raw_reader(pack, BufferedReader())
    try:
        raw = memoryview(tensor.numpy().data)
        reader.read(path, entry.offset_bytes, entry.length_bytes, raw)
    finally:
        reader.close()
    return tensor
