"""The safetensors header: 8 bytes of length, that many bytes of JSON, then the tensors' bytes.

Offsets here always count from the start of the file, unlike in the JSON, where they count from
the end of the header. https://huggingface.co/docs/safetensors is the format's own page.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerpack.formats.errors import LayerpackError, PackError
from layerpack.formats.jsontext import parse_json
from layerpack.formats.lfs import REMEDY, is_pointer
from layerpack.formats.units import DTYPE_BYTES, PAGE_BYTES, align_up, num_elements

MAX_HEADER_BYTES = 100_000_000
"""The bound that the safetensors library itself sets."""
_MAX_DIMENSION = 1 << 48


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    length_bytes: int

    @property
    def end_bytes(self) -> int:
        """First byte after the tensor."""
        return self.offset_bytes + self.length_bytes


def encode_header(entries: Iterable[TensorEntry], *, data_start_bytes: int) -> bytes:
    """The file's first `data_start_bytes` bytes, JSON padded with spaces. Entries in file order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for entry in entries:
        begin = entry.offset_bytes - data_start_bytes
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, begin + entry.length_bytes],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    length = data_start_bytes - 8
    if len(text) > length:
        raise ValueError(f"header of {len(text)} bytes does not fit into {length}")
    return struct.pack("<Q", length) + text.ljust(length)


def header_bytes(entries: Iterable[TensorEntry]) -> int:
    """An upper bound of the encoded header, rounded up to a page: where data may start.

    Depends on names, dtypes and shapes only, so it is known before any offset is.
    """
    total = 8 + len('{"__metadata__":{"format":"pt"}}')
    for entry in entries:
        total += len(json.dumps(entry.name, ensure_ascii=False).encode())
        total += len(json.dumps(list(entry.shape), separators=(",", ":")))
        total += len(',:{"dtype":"F8_E4M3","shape":,"data_offsets":[,]}') + 2 * 20
    return align_up(total, PAGE_BYTES)


def parse_header(
    raw: bytes, *, file_bytes: int, where: str, error: type[LayerpackError] = PackError
) -> tuple[TensorEntry, ...]:
    """Entries in file order out of the file's first bytes; `raw` holds at least the whole header.

    Raises `error` if the header is not valid, or its tensors do not tile the file exactly: holes,
    overlaps, bytes before or after them.
    """
    length = _header_length(raw[:8], file_bytes=file_bytes, where=where, error=error)
    data_start = 8 + length
    try:
        table = parse_json(raw[8:data_start])
    except ValueError as reason:
        raise error(f"{where}: the safetensors header is not valid JSON ({reason})") from None
    if not isinstance(table, dict):
        raise error(f"{where}: the safetensors header is not a JSON object")
    table.pop("__metadata__", None)
    return header_entries(
        table, data_start=data_start, file_bytes=file_bytes, where=where, error=error
    )


def header_entries(
    table: Mapping[str, Any],
    *,
    data_start: int,
    file_bytes: int,
    where: str,
    error: type[LayerpackError] = PackError,
) -> tuple[TensorEntry, ...]:
    """The same from the header's JSON without its metadata, and where it ends."""
    entries = sorted(
        (_entry(name, value, data_start, where, error) for name, value in table.items()),
        key=lambda entry: (entry.offset_bytes, entry.end_bytes),
    )
    position = data_start
    for entry in entries:
        if entry.offset_bytes != position:
            raise error(
                f"{where}: tensor {entry.name} begins at byte {entry.offset_bytes} where the one "
                f"before it ends at {position}; the file is damaged"
            )
        position = entry.end_bytes
    if position != file_bytes:
        raise error(
            f"{where}: its tensors end at byte {position} but the file has {file_bytes}; "
            "it is truncated or damaged"
        )
    return tuple(entries)


def read_header(path: Path, *, error: type[LayerpackError] = PackError) -> tuple[TensorEntry, ...]:
    """Entries of the safetensors file at `path`, in file order. Raises `error`, naming the file."""
    try:
        with open(path, "rb", buffering=0) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = _header_length(first, file_bytes=file_bytes, where=str(path), error=error)
            raw = first
            while len(raw) < 8 + length and (more := file.read(8 + length - len(raw))):
                raw += more
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror})") from reason
    return parse_header(raw, file_bytes=file_bytes, where=str(path), error=error)


def _header_length(
    first: bytes, *, file_bytes: int, where: str, error: type[LayerpackError]
) -> int:
    if len(first) < 8 or file_bytes < 10:
        raise error(f"{where}: {file_bytes} bytes are too few for a safetensors file")
    if is_pointer(first):
        raise error(f"{where}: {REMEDY}")
    (length,) = struct.unpack("<Q", first)
    if length > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise error(
            f"{where}: states a header of {length} bytes in a file of {file_bytes}; "
            "not a safetensors file, or truncated"
        )
    return int(length)


def _entry(
    name: str, value: Any, data_start: int, where: str, error: type[LayerpackError]
) -> TensorEntry:
    problem = f"{where}: header entry of tensor {name} is not valid"
    if not isinstance(value, Mapping):
        raise error(problem)
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise error(f"{where}: tensor {name} has dtype {dtype!r}, which is not known")
    if not isinstance(shape, list) or not is_shape(shape):
        raise error(f"{problem} (shape)")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets))):
        raise error(f"{problem} (data_offsets)")
    begin, end = offsets
    wanted = num_elements(tuple(shape)) * DTYPE_BYTES[dtype]
    if end - begin != wanted:
        raise error(f"{where}: tensor {name} has {end - begin} bytes, its shape needs {wanted}")
    return TensorEntry(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        offset_bytes=data_start + begin,
        length_bytes=wanted,
    )


def is_size(value: Any) -> bool:
    """Whether a JSON value is a plausible count: an int (not a bool) from 0 to 2**48."""
    return type(value) is int and 0 <= value <= _MAX_DIMENSION


def is_shape(value: Any) -> bool:
    """Whether a JSON value is a tensor's shape: at most 8 plausible dimensions."""
    return isinstance(value, list) and len(value) <= 8 and all(map(is_size, value))
