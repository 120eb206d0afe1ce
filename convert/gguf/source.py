"""A GGUF file as a checkpoint: dequantised one tensor at a time, named as transformers names it.

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
from layerpack.convert.gguf.once import each_thing_once
from layerpack.convert.source.protocol import SourceTensor, local_facts, path_id, real_path
from layerpack.convert.source.reading import WeightFile, weights_digest
from layerpack.formats.errors import LayerpackError, SourceError, UnsupportedError
from layerpack.formats.text import without_path
from layerpack.formats.units import num_elements

_ROW_WISE = ("token_embd.weight", "output.weight")
"""The largest tensors, and ones whose rows no processor moves: they may be read in pieces."""
_PIECE_ELEMENTS = 1 << 25


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """Where a tensor lies in the file. `shape` is numpy's: rows first, in bytes if quantised."""

    gguf_name: str
    kind: Any
    offset_bytes: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class GgufSource:
    """A Source over one GGUF file. Needs the extra `gguf`."""

    kind = "gguf"
    revision: str | None = None
    scratch_bytes = 0
    download_bytes = 0
    max_held_files = 1

    @classmethod
    def open(cls, path: Path) -> GgufSource:
        """Reads metadata and names, no weight. Raises SourceError or UnsupportedError."""
        try:
            import gguf
        except ImportError:
            raise SourceError(
                f"{path}: reading GGUF needs the package gguf; pip install layerpack[gguf]"
            ) from None
        directory = tempfile.TemporaryDirectory(prefix="layerpack-gguf-")
        try:
            with each_thing_once(gguf):
                return cls(path, directory, gguf)
        except LayerpackError:
            directory.cleanup()
            raise
        except Exception as reason:
            # A damaged file fails anywhere in either package, in any way.
            directory.cleanup()
            text = without_path(reason, path).strip().splitlines() or [type(reason).__name__]
            raise SourceError(
                f"{path}: cannot be read as a GGUF checkpoint ({text[0][:200]})"
            ) from reason

    def __init__(self, path: Path, directory: tempfile.TemporaryDirectory[str], gguf: Any) -> None:
        self.id, self.place = path_id(path), real_path(path)
        self._path, self._directory, self._gguf = path, directory, gguf
        self._file_name = path_id(Path(path.name))
        reader = gguf.GGUFReader(path)
        _refuse(reader, path)
        self.config_dir = Path(directory.name)
        model, parameters = write_config_dir(path, self.config_dir)
        self._processor, names = _name_map(reader, model, parameters)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._stored: dict[str, _Stored] = {}
        self.tensors: dict[str, SourceTensor] = {}
        for tensor in reader.tensors:
            # What has no name here, such as rotary tables, transformers leaves unread, too.
            name = names.get(tensor.name, "")
            if name in shapes:
                self._add(name, tensor, shapes[name])
        self.files = (local_facts(self._file_name, path),)
        self._file = WeightFile(path)

    def fetch(self, file: str, report: Callable[[int], None]) -> None:
        """Nothing to wait for: the file is here."""

    def digest(self, file: str, check: Callable[[], None] = lambda: None) -> str:
        """xxh3_128 of the whole file; as a side effect the file enters the page cache."""
        return weights_digest(self._path, check)

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
        """Close the file."""
        self._file.close()

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._directory.cleanup()

    def _add(self, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
        if int(tensor.n_elements) != num_elements(shape):
            raise SourceError(
                f"{self._path}: {tensor.name} has {int(tensor.n_elements)} elements where {name} "
                f"needs {num_elements(shape)}; the file is damaged or of a kind not supported"
            )
        self._check_kind(tensor)
        self._stored[name] = _Stored(
            gguf_name=tensor.name,
            kind=tensor.tensor_type,
            offset_bytes=int(tensor.data_offset),
            dtype=tensor.data.dtype,
            shape=tuple(map(int, tensor.data.shape)),
        )
        self.tensors[name] = SourceTensor(
            name=name,
            dtype="BF16",
            shape=shape,
            file=self._file_name,
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
                f"{self._path}: tensor {tensor.name} is {tensor.tensor_type.name}, which the gguf "
                "package cannot dequantise; use another quantisation"
            ) from None

    def _check_shape(self, name: str, tensor: torch.Tensor) -> None:
        if tuple(tensor.shape) != self.tensors[name].shape:
            raise UnsupportedError(
                f"{self._path}: {name} comes out with the shape {list(tensor.shape)} where "
                f"{list(self.tensors[name].shape)} is wanted"
            )

    def _dequantise(self, stored: _Stored, first: int, end: int) -> np.ndarray[Any, Any]:
        """Rows [first, end) as floats."""
        row_bytes = num_elements(stored.shape[1:]) * stored.dtype.itemsize
        raw = memoryview(bytearray((end - first) * row_bytes))
        offset_bytes = stored.offset_bytes + first * row_bytes
        self._file.read_into(raw, offset_bytes, what=f"the tensor {stored.gguf_name}")
        data = np.frombuffer(raw, stored.dtype).reshape(end - first, *stored.shape[1:])
        values: np.ndarray[Any, Any] = self._gguf.dequantize(data, stored.kind)
        return values


def _name_map(reader: Any, model: Any, parameters: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

    (architecture,) = read_field(reader, "general.architecture")
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parameters["config"])
    return processor, get_gguf_hf_weights_map(model, processor)


def _refuse(reader: Any, path: Path) -> None:
    field = reader.fields.get("split.count")
    if field is not None and int(field.contents()) > 1:
        raise UnsupportedError(
            f"{path}: one of {int(field.contents())} parts of a split GGUF file; "
            "join them first with llama-gguf-split --merge"
        )


def _bfloat16(values: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
