"""A GGUF model as a checkpoint: dequantised one tensor at a time, named as transformers names it.

Which tensor is which, and how llama.cpp's converter reordered it, is transformers' knowledge: its
name map and tensor processors are used, so the weights are what `from_pretrained(gguf_file=…)`
would give. The arithmetic is the gguf package's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from layerpack.convert.gguf.config import write_config_dir
from layerpack.convert.gguf.files import Files, fill_header
from layerpack.convert.gguf.rope import POSITION_TENSORS
from layerpack.convert.source.protocol import SourceTensor
from layerpack.convert.source.reading import WeightFile, weights_digest
from layerpack.formats.errors import LayerpackError, SourceError, UnsupportedError
from layerpack.formats.text import without_path
from layerpack.formats.units import num_elements
from layerpack.libraries import gguf_api

_ROW_WISE = ("token_embd.weight", "output.weight")
"""The largest tensors, and ones whose rows no processor moves: they may be read in pieces."""
_PIECE_ELEMENTS = 1 << 25
_MANY = 1000
_ROTARY = ".attn_rot_embd"  # frequencies as files of 2023 had them: the config's own


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """Where a tensor lies in the file. `shape` is numpy's: rows first, in bytes if quantised."""

    gguf_name: str
    file: str
    kind: Any
    offset_bytes: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class GgufSource:
    """A Source over the files of one GGUF model. Needs the extra `gguf`."""

    kind = "gguf"

    @classmethod
    def open(cls, files: Files) -> GgufSource:
        """Reads metadata and names, no weight. Raises SourceError or UnsupportedError."""
        try:
            import gguf
        except ImportError:
            raise SourceError(
                f"{files.id}: reading GGUF needs the package gguf; pip install layerpack[gguf]"
            ) from None
        directory = tempfile.TemporaryDirectory(prefix="layerpack-gguf-")
        try:
            for name in files.paths:
                fill_header(files, name, gguf.GGUFReader)
            with gguf_api.each_thing_once(gguf):
                return cls(files, directory, gguf)
        except LayerpackError:
            directory.cleanup()
            raise
        except Exception as reason:
            # A damaged file fails anywhere in either package, in any way.
            directory.cleanup()
            path = next(iter(files.paths.values()))
            text = without_path(reason, path).strip().splitlines() or [type(reason).__name__]
            raise SourceError(
                f"{files.id}: cannot be read as a GGUF checkpoint ({text[0][:200]})"
            ) from reason

    def __init__(
        self, files: Files, directory: tempfile.TemporaryDirectory[str], gguf: Any
    ) -> None:
        self.id, self.place, self.revision = files.id, files.place, files.revision
        self.files, self.max_held_files = files.facts, files.max_held_files
        self.download_bytes, self.scratch_bytes = files.download_bytes, files.scratch_bytes
        self._held, self._directory, self._gguf = files, directory, gguf
        readers = {name: gguf.GGUFReader(path) for name, path in files.paths.items()}
        for name, reader in readers.items():
            for tensor in reader.tensors:
                if tensor.name in POSITION_TENSORS:
                    begin = int(tensor.data_offset)
                    files.fill(name, begin, begin + int(tensor.n_bytes))
        first = next(iter(readers.values()))
        tensors = {tensor.name: tensor.data for r in readers.values() for tensor in r.tensors}
        # The vocabulary's arrays are transformers' to read: it takes seconds.
        metadata = {
            key: field.contents() for key, field in first.fields.items() if len(field.data) < _MANY
        }
        self.config_dir = Path(directory.name)
        model, fields = write_config_dir(
            files.id, next(iter(files.paths.values())), metadata, tensors, self.config_dir
        )
        self._processor = gguf_api.tensor_processor(metadata["general.architecture"], fields)
        names = gguf_api.tensor_names(model, self._processor)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._stored: dict[str, _Stored] = {}
        self.tensors: dict[str, SourceTensor] = {}
        for file, reader in readers.items():
            for tensor in reader.tensors:
                name = names.get(tensor.name, "")
                if name in shapes:
                    self._add(file, name, tensor, shapes[name])
                elif tensor.name not in POSITION_TENSORS and not tensor.name.endswith(_ROTARY):
                    # For the plan to refuse by its name, as there is no place for it.
                    self._list(file, tensor.name, tensor, tuple(tensor.data.shape))
        self._files: dict[str, WeightFile] = {}
        self._digests: dict[str, str | None] = {}

    def fetch(self, file: str, report: Callable[[int], None]) -> None:
        """Wait until the file is here. Raises HubError."""
        path, self._digests[file] = self._held.fetch(file, report)
        self._files[file] = WeightFile(path)

    def digest(self, file: str, check: Callable[[], None] = lambda: None) -> str:
        """The sha256 that the Hub states, or xxh3_128 of all of it; it enters the page cache."""
        return self._digests[file] or weights_digest(self._files[file].path, check)

    def read(
        self, name: str, rows: tuple[int, int] | None = None, *, pin: bool = False
    ) -> torch.Tensor:
        """The tensor in bfloat16, or its rows [begin, end); never pinned.

        Memory: the largest tensors are dequantised a piece at a time; others take, for a moment,
        their size in float32. Raises SourceError.
        """
        stored = self._stored[name]
        if stored.gguf_name not in _ROW_WISE:
            values = self._dequantise(stored, 0, stored.shape[0])
            whole = self._processor.process(
                weights=values, name=stored.gguf_name, tensor_key_mapping={}, parsed_parameters={}
            ).weights
            tensor = _bfloat16(whole)
            self._check_shape(name, tensor)
            return tensor if rows is None else tensor[slice(*rows)].contiguous()
        shape = self.tensors[name].shape
        first, end = rows or (0, shape[0])
        result = torch.empty((end - first, *shape[1:]), dtype=torch.bfloat16)
        step = max(1, _PIECE_ELEMENTS // max(1, num_elements(shape[1:])))
        for begin in range(first, end, step):
            stop = min(begin + step, end)
            result[begin - first : stop - first] = _bfloat16(self._dequantise(stored, begin, stop))
        return result

    def release(self, file: str) -> None:
        """Close the file; one that was downloaded to be read goes."""
        opened = self._files.pop(file)
        opened.close()
        self._held.release(opened.path)

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for opened in self._files.values():
            opened.close()
        self._directory.cleanup()

    def _add(self, file: str, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
        if int(tensor.n_elements) != num_elements(shape):
            raise SourceError(
                f"{self.id}: {tensor.name} has {int(tensor.n_elements)} elements where "
                f"{name} needs {num_elements(shape)}; the file is damaged or of a kind not "
                "supported"
            )
        self._check_kind(tensor)
        self._stored[name] = _Stored(
            gguf_name=tensor.name,
            file=file,
            kind=tensor.tensor_type,
            offset_bytes=int(tensor.data_offset),
            dtype=tensor.data.dtype,
            shape=tuple(map(int, tensor.data.shape)),
        )
        self._list(file, name, tensor, shape)

    def _list(self, file: str, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
        self.tensors[name] = SourceTensor(
            name=name,
            dtype="BF16",
            shape=shape,
            file=file,
            offset_bytes=int(tensor.data_offset),
            length_bytes=int(tensor.n_bytes),
            whole_only=tensor.name not in _ROW_WISE,
        )

    def _check_kind(self, tensor: Any) -> None:
        """Refuse what the gguf package cannot dequantise, before any work."""
        _, block_bytes = self._gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        probe = np.zeros((1, block_bytes), np.uint8).view(tensor.data.dtype)
        try:
            self._gguf.dequantize(probe, tensor.tensor_type)
        except NotImplementedError:
            raise UnsupportedError(
                f"{self.id}: tensor {tensor.name} is {tensor.tensor_type.name}, which the gguf "
                "package cannot dequantise; use another quantisation"
            ) from None

    def _check_shape(self, name: str, tensor: torch.Tensor) -> None:
        if tuple(tensor.shape) != self.tensors[name].shape:
            raise UnsupportedError(
                f"{self.id}: {name} comes out with the shape {list(tensor.shape)} where "
                f"{list(self.tensors[name].shape)} is wanted"
            )

    def _dequantise(self, stored: _Stored, first: int, end: int) -> np.ndarray[Any, Any]:
        """Rows [first, end) as floats."""
        row_bytes = num_elements(stored.shape[1:]) * stored.dtype.itemsize
        raw = memoryview(bytearray((end - first) * row_bytes))
        offset_bytes = stored.offset_bytes + first * row_bytes
        self._files[stored.file].read_into(raw, offset_bytes, what=f"the tensor {stored.gguf_name}")
        data = np.frombuffer(raw, stored.dtype).reshape(end - first, *stored.shape[1:])
        values: np.ndarray[Any, Any] = self._gguf.dequantize(data, stored.kind)
        return values


def _bfloat16(values: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
