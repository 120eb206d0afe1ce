"""`layerpack.json` to a Manifest and back. Parsing checks everything and reports every problem.

The document holds a digest of itself: of its bytes without the line that states it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from layerpack.formats.digest import bytes_digest
from layerpack.formats.errors import PackError, PackVersionError
from layerpack.formats.header import TensorEntry, is_shape, is_size
from layerpack.formats.jsontext import dump_json, parse_json
from layerpack.formats.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Blob,
    Manifest,
    Model,
    PackFile,
    Quantization,
    Role,
    Source,
    SourceFile,
)
from layerpack.formats.nf4 import NESTED_BLOCK_SIZE, Nf4State, is_finite
from layerpack.formats.validate import manifest_problems

_SHOWN_PROBLEMS = 3
# One space of indentation: a key of the document itself, not of an object in it.
_DIGEST_LINE = re.compile(rb'^ "digest": "(xxh3_128:[0-9a-f]{32})",\n', re.MULTILINE)


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of `layerpack.json`: same manifest, same bytes."""
    opening: dict[str, Any] = {
        "format": "layerpack",
        "format_version": FORMAT_VERSION,
        "features": [],
    }
    rest = {
        "producer": manifest.producer,
        "source": {
            "kind": manifest.source.kind,
            "id": manifest.source.id,
            "revision": manifest.source.revision,
            "files": [_file_fields(file) for file in manifest.source.files],
        },
        "model": {
            "architecture": manifest.model.architecture,
            "layers_path": manifest.model.layers_path,
            "num_layers": manifest.model.num_layers,
            "dtype": manifest.model.dtype,
            "embedding": manifest.model.embedding,
            "head": manifest.model.head,
            "num_parameters": manifest.model.num_parameters,
        },
        "quantization": {
            "type": "nf4",
            "block_size": manifest.quantization.block_size,
            "double_quant": manifest.quantization.double_quant,
            "nested_block_size": NESTED_BLOCK_SIZE,
            "head": manifest.quantization.head,
        },
        "files": [_file_fields(file) for file in manifest.files],
        "blobs": [_blob_fields(blob) for blob in manifest.blobs],
    }
    digest = bytes_digest(dump_json(opening | rest))
    return dump_json(opening | {"digest": digest} | rest)


def _file_fields(file: SourceFile | PackFile) -> dict[str, Any]:
    return {"name": file.name, "size_bytes": file.file_bytes, "digest": file.digest}


def _blob_fields(blob: Blob) -> dict[str, Any]:
    tensors = []
    for entry in blob.tensors:
        fields: dict[str, Any] = {
            "name": entry.name,
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "offset_bytes": entry.offset_bytes,
            "length_bytes": entry.length_bytes,
        }
        if state := blob.nf4.get(entry.name):
            fields["nf4"] = {
                "shape": list(state.shape),
                "dtype": state.dtype,
                "block_size": state.block_size,
                "nested_offset": state.nested_offset,
            }
        tensors.append(fields)
    return {
        "role": blob.role.value,
        "layer": blob.layer,
        "file": blob.file,
        "size_bytes": blob.file_bytes,
        "digest": blob.digest,
        "tensors": tensors,
    }


def parse_manifest(raw: bytes, *, where: str = MANIFEST_NAME) -> Manifest:
    """The manifest in `raw`. Raises PackVersionError for a newer format, else PackError.

    The message names up to three problems and the number of the rest; nothing is returned that
    `validate.manifest_problems` finds fault with.
    """
    try:
        document = parse_json(raw)
    except ValueError as reason:
        raise PackError(f"{where}: not valid JSON ({reason}); convert again") from None
    if not isinstance(document, dict) or document.get("format") != "layerpack":
        raise PackError(f'{where}: not a layerpack manifest (no "format": "layerpack")')
    version, features = document.get("format_version"), document.get("features", [])
    if not isinstance(version, int) or not is_size(version) or version < 1:
        raise PackError(f"{where}: format_version {version!r} is not a number from 1 up")
    if version > FORMAT_VERSION or features != []:
        raise PackVersionError(
            f"{where}: written in format version {version}"
            + (f" with {features!r:.100}" if features != [] else "")
            + f", this layerpack reads up to {FORMAT_VERSION}; install a newer layerpack"
        )
    reader = _Reader()
    manifest = reader.manifest(document)
    problems = reader.problems or manifest_problems(manifest) or _digest_problems(raw)
    if problems:
        shown = "; ".join(problems[:_SHOWN_PROBLEMS])
        rest = len(problems) - _SHOWN_PROBLEMS
        raise PackError(f"{where}: {shown}" + (f"; and {rest} more problems" if rest > 0 else ""))
    return manifest


def _digest_problems(raw: bytes) -> list[str]:
    found = _DIGEST_LINE.search(raw)
    if found is None:
        return ["its own digest is missing; it was changed by hand or damaged"]
    if bytes_digest(raw[: found.start()] + raw[found.end() :]) != found[1].decode():
        return ["its content is not what its own digest says; it was changed by hand or damaged"]
    return []


class _Reader:
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
        blobs = self.take(document, "blobs", _is_list, "", [])
        return Manifest(
            producer=self.take(document, "producer", _is_text, "", ""),
            source=self.source(document.get("source")),
            model=self.model(document.get("model")),
            quantization=self.quantization(document.get("quantization")),
            blobs=tuple(self.blob(blob, f"blobs[{i}].") for i, blob in enumerate(blobs)),
            files=tuple(PackFile(**fields) for fields in self.files(document, "")),
        )

    def source(self, fields: Any) -> Source:
        return Source(
            kind=self.take(fields, "kind", _is_text, "source.", ""),
            id=self.take(fields, "id", _is_text, "source.", ""),
            revision=self.take(fields, "revision", _is_text_or_none, "source.", None),
            files=tuple(SourceFile(**file) for file in self.files(fields, "source.")),
        )

    def files(self, fields: Any, where: str) -> list[dict[str, Any]]:
        files = self.take(fields, "files", _is_list, where, [])
        return [
            {
                "name": self.take(file, "name", _is_text, f"{where}files[{i}].", ""),
                "file_bytes": self.take(file, "size_bytes", is_size, f"{where}files[{i}].", 0),
                "digest": self.take(file, "digest", _is_text, f"{where}files[{i}].", ""),
            }
            for i, file in enumerate(files)
        ]

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

    def quantization(self, fields: Any) -> Quantization:
        where = "quantization."
        self.take(fields, "type", lambda value: value == "nf4", where, "")
        self.take(fields, "nested_block_size", lambda v: v == NESTED_BLOCK_SIZE, where, 0)
        return Quantization(
            block_size=self.take(fields, "block_size", is_size, where, 64),
            double_quant=self.take(fields, "double_quant", _is_bool, where, True),
            head=self.take(fields, "head", _is_bool, where, False),
        )

    def blob(self, fields: Any, where: str) -> Blob:
        tensors = self.take(fields, "tensors", _is_list, where, [])
        entries = [self.tensor(t, f"{where}tensors[{i}].") for i, t in enumerate(tensors)]
        states = {
            entry.name: self.state(tensor["nf4"], f"{where}tensors[{i}].nf4.")
            for i, (entry, tensor) in enumerate(zip(entries, tensors, strict=True))
            if isinstance(tensor, dict) and "nf4" in tensor
        }
        role = self.take(fields, "role", lambda v: v in _ROLES, where, Role.LAYER.value)
        return Blob(
            role=Role(role),
            layer=self.take(fields, "layer", lambda v: v is None or is_size(v), where, None),
            file=self.take(fields, "file", _is_text, where, ""),
            file_bytes=self.take(fields, "size_bytes", is_size, where, 0),
            digest=self.take(fields, "digest", _is_text, where, ""),
            tensors=tuple(entries),
            nf4=states,
        )

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
