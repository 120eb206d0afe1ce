"""Fields of the right types out of the manifest's JSON; what is wrong is noted, not raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layerpack.formats.blob.header import TensorEntry, is_shape, is_size
from layerpack.formats.blob.nf4 import NESTED_BLOCK_SIZE, Nf4State, is_finite
from layerpack.formats.digest import is_digest
from layerpack.formats.frames.table import FrameTable
from layerpack.formats.manifest.facts import (
    Blob,
    Calibrated,
    Compression,
    FileEntry,
    Manifest,
    Model,
    Quantization,
    Role,
    SourceRecord,
)


class ManifestReader:
    """Takes fields of the right type out of JSON objects; notes each that is not there."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def take(
        self, fields: Any, key: str, accept: Callable[[Any], bool], where: str, default: Any
    ) -> Any:
        value = fields.get(key) if isinstance(fields, dict) else None
        if accept(value):
            return value
        self.problems.append(f"{where}{key} is missing or not valid")
        return default

    def manifest(self, document: dict[str, Any]) -> Manifest:
        """All of it; to be thrown away if there are `problems`."""
        blobs = self.take(document, "blobs", _is_list, "", [])
        return Manifest(
            producer=self.take(document, "producer", _is_text, "", ""),
            source=self.source(document.get("source")),
            model=self.model(document.get("model")),
            quantization=self.quantization(document.get("quantization")),
            blobs=tuple(self.blob(blob, f"blobs[{i}].") for i, blob in enumerate(blobs)),
            files=self.files(document, ""),
            compression=self.compression(document),
        )

    def compression(self, document: dict[str, Any]) -> Compression | None:
        if not document.get("features"):
            return None
        fields, where = document.get("compression"), "compression."
        self.take(fields, "type", lambda value: value == "zstd", where, "")
        return Compression(
            level=self.take(fields, "level", is_size, where, 0),
            library=self.take(fields, "library", _is_text, where, ""),
        )

    def source(self, fields: Any) -> SourceRecord:
        return SourceRecord(
            kind=self.take(fields, "kind", _is_text, "source.", ""),
            id=self.take(fields, "id", _is_text, "source.", ""),
            revision=self.take(fields, "revision", _is_text_or_none, "source.", None),
            files=self.files(fields, "source."),
        )

    def files(self, fields: Any, where: str) -> tuple[FileEntry, ...]:
        files = self.take(fields, "files", _is_list, where, [])
        return tuple(
            FileEntry(
                name=self.take(file, "name", _is_text, f"{where}files[{i}].", ""),
                file_bytes=self.take(file, "size_bytes", is_size, f"{where}files[{i}].", 0),
                digest=self.take(file, "digest", _is_text, f"{where}files[{i}].", ""),
            )
            for i, file in enumerate(files)
        )

    def model(self, fields: Any) -> Model:
        return Model(
            architecture=self.take(fields, "architecture", _is_text, "model.", ""),
            layers_path=self.take(fields, "layers_path", _is_text, "model.", ""),
            num_layers=self.take(fields, "num_layers", is_size, "model.", 0),
            dtype=self.take(fields, "dtype", _is_text, "model.", ""),
            embedding=self.take(fields, "embedding", _is_text, "model.", ""),
            head=self.take(fields, "head", _is_text, "model.", ""),
            num_parameters=self.take(fields, "num_parameters", is_size, "model.", 0),
        )

    def quantization(self, fields: Any) -> Quantization | None:
        where = "quantization."
        if isinstance(fields, dict) and fields.get("type") == "none":
            return None
        self.take(fields, "type", lambda value: value == "nf4", where, "")
        self.take(fields, "nested_block_size", lambda v: v == NESTED_BLOCK_SIZE, where, 0)
        return Quantization(
            block_size=self.take(fields, "block_size", is_size, where, 64),
            double_quant=self.take(fields, "double_quant", _is_bool, where, True),
            head=self.take(fields, "head", _is_bool, where, False),
            calibration=self.calibration(fields),
        )

    def calibration(self, quantization: Any) -> Calibrated | None:
        """An old reader goes on without it: the bytes are plain NF4."""
        if not isinstance(quantization, dict) or "calibration" not in quantization:
            return None
        fields, where = quantization["calibration"], "quantization.calibration."
        return Calibrated(
            digest=self.take(fields, "digest", is_digest, where, ""),
            text=self.take(fields, "text", is_digest, where, ""),
            num_tokens=self.take(fields, "tokens", is_size, where, 0),
            num_weights=self.take(fields, "weights", is_size, where, 0),
        )

    def blob(self, fields: Any, where: str) -> Blob:
        tensors = self.take(fields, "tensors", _is_list, where, [])
        entries = [self.tensor(t, f"{where}tensors[{i}].") for i, t in enumerate(tensors)]
        states = {
            entry.name: self.state(tensor["nf4"], f"{where}tensors[{i}].nf4.")
            for i, (entry, tensor) in enumerate(zip(entries, tensors, strict=True))
            if isinstance(tensor, dict) and "nf4" in tensor
        }
        frames = None
        if isinstance(fields, dict) and "frames" in fields:
            first_bytes = entries[0].offset_bytes if entries else 0
            frames = self.frames(fields["frames"], first_bytes, f"{where}frames.")
        role = self.take(fields, "role", lambda v: v in _ROLES, where, Role.LAYER.value)
        return Blob(
            role=Role(role),
            layer=self.take(fields, "layer", lambda v: v is None or is_size(v), where, None),
            file=self.take(fields, "file", _is_text, where, ""),
            file_bytes=self.take(fields, "size_bytes", is_size, where, 0),
            digest=self.take(fields, "digest", _is_text, where, ""),
            tensors=tuple(entries),
            nf4=states,
            frames=frames,
        )

    def frames(self, fields: Any, first_bytes: int, where: str) -> FrameTable | None:
        lengths = self.take(fields, "stored_bytes", _is_list, where, [])
        if not all(map(is_size, lengths)):
            self.problems.append(f"{where}stored_bytes is missing or not valid")
            return None
        try:
            return FrameTable.build(
                first_bytes=first_bytes,
                frame_bytes=self.take(fields, "frame_bytes", is_size, where, 0),
                raw_bytes=self.take(fields, "raw_size_bytes", is_size, where, 0),
                raw_digest=self.take(fields, "raw_digest", is_digest, where, ""),
                stored_bytes=lengths,
                coding=self.take(fields, "coding", lambda v: isinstance(v, str), where, ""),
            )
        except ValueError as reason:
            self.problems.append(f"{where.removesuffix('.')}: {reason}")
            return None

    def tensor(self, fields: Any, where: str) -> TensorEntry:
        return TensorEntry(
            name=self.take(fields, "name", _is_text, where, ""),
            dtype=self.take(fields, "dtype", _is_text, where, ""),
            shape=tuple(self.take(fields, "shape", is_shape, where, [])),
            offset_bytes=self.take(fields, "offset_bytes", is_size, where, 0),
            length_bytes=self.take(fields, "length_bytes", is_size, where, 0),
        )

    def state(self, fields: Any, where: str) -> Nf4State:
        offset = self.take(
            fields, "nested_offset", lambda v: v is None or is_finite(v), where, None
        )
        return Nf4State(
            shape=tuple(self.take(fields, "shape", is_shape, where, [])),
            block_size=self.take(fields, "block_size", is_size, where, 64),
            dtype=self.take(fields, "dtype", _is_text, where, ""),
            nested_offset=None if offset is None else float(offset),
        )


_ROLES = tuple(role.value for role in Role)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 4096


def _is_text_or_none(value: Any) -> bool:
    return value is None or _is_text(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)
