"""One safetensors file of a checkpoint: its tensors, or rows of them, read into memory."""

from __future__ import annotations

from pathlib import Path

import torch

from layerpack.convert.source.protocol import SourceTensor
from layerpack.convert.source.reading import WeightFile
from layerpack.formats.blob.header import TensorEntry, read_header
from layerpack.formats.errors import SourceError
from layerpack.formats.units import num_elements
from layerpack.libraries.dtypes import TORCH_DTYPES


class Shard:
    """An open file; threads may read at the same time. `close` when done."""

    def __init__(self, path: Path) -> None:
        """Raises SourceError if the file cannot be opened or its header is not valid."""
        self.path = path
        self.entries: dict[str, TensorEntry] = {
            entry.name: entry for entry in read_header(path, error=SourceError)
        }
        self._file = WeightFile(path)

    def read(
        self, name: str, rows: tuple[int, int] | None = None, *, pin: bool = False
    ) -> torch.Tensor:
        """Tensor `name`, or its rows [begin, end). Raises SourceError on a short read."""
        entry = self.entries[name]
        shape, begin_bytes = entry.shape, entry.offset_bytes
        if rows is not None:
            first, end = rows
            begin_bytes += first * (entry.length_bytes // shape[0])
            shape = (end - first, *shape[1:])
        tensor = torch.empty(shape, dtype=TORCH_DTYPES[entry.dtype], pin_memory=pin)
        if num_elements(shape):
            raw = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            self._file.read_into(raw, begin_bytes, what=f"the tensor {name}")
        return tensor

    def close(self) -> None:
        """Give the file back. Safe to call twice."""
        self._file.close()


def source_tensor(file: str, entry: TensorEntry) -> SourceTensor:
    """What the header of a shard, listed as `file`, says of one tensor, as a Source tells it."""
    return SourceTensor(
        name=entry.name,
        dtype=entry.dtype,
        shape=entry.shape,
        file=file,
        offset_bytes=entry.offset_bytes,
        length_bytes=entry.length_bytes,
    )
