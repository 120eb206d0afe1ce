"""`layerpack.json` to a Manifest and back. Parsing checks everything and reports every problem.

The document holds a digest of itself: of its bytes without the line that states it.
"""

from __future__ import annotations

import re
from typing import Any

from layerpack.formats.blob.header import is_size
from layerpack.formats.blob.nf4 import NESTED_BLOCK_SIZE
from layerpack.formats.digest import bytes_digest
from layerpack.formats.errors import PackError, PackVersionError
from layerpack.formats.frames.table import FrameTable
from layerpack.formats.jsontext import dump_json, parse_json
from layerpack.formats.manifest.facts import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Blob,
    Calibrated,
    FileEntry,
    Manifest,
    Quantization,
)
from layerpack.formats.manifest.fields import ManifestReader
from layerpack.formats.manifest.rules import manifest_problems
from layerpack.formats.text import printable

ZSTD_FEATURE = "zstd"
_SHOWN_PROBLEMS = 3
# One space of indentation: a key of the document itself, not of an object in it.
_DIGEST_LINE = re.compile(rb'^ "digest": "(xxh3_128:[0-9a-f]{32})",\n', re.MULTILINE)


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of `layerpack.json`: same manifest, same bytes."""
    opening: dict[str, Any] = {
        "format": "layerpack",
        "format_version": FORMAT_VERSION,
        "features": [] if manifest.compression is None else [ZSTD_FEATURE],
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
        "quantization": _quantization_fields(manifest.quantization),
        **_compression_fields(manifest),
        "files": [_file_fields(file) for file in manifest.files],
        "blobs": [_blob_fields(blob) for blob in manifest.blobs],
    }
    digest = bytes_digest(dump_json(opening | rest))
    return dump_json(opening | {"digest": digest} | rest)


def _quantization_fields(how: Quantization | None) -> dict[str, Any]:
    if how is None:
        return {"type": "none"}
    return {
        "type": "nf4",
        "block_size": how.block_size,
        "double_quant": how.double_quant,
        "nested_block_size": NESTED_BLOCK_SIZE,
        "head": how.head,
        **_calibration_fields(how.calibration),
    }


def _calibration_fields(used: Calibrated | None) -> dict[str, Any]:
    if used is None:
        return {}
    return {
        "calibration": {
            "digest": used.digest,
            "text": used.text,
            "tokens": used.num_tokens,
            "weights": used.num_weights,
        }
    }


def _compression_fields(manifest: Manifest) -> dict[str, Any]:
    if (used := manifest.compression) is None:
        return {}
    return {"compression": {"type": "zstd", "level": used.level, "library": used.library}}


def _frame_fields(table: FrameTable) -> dict[str, Any]:
    return {
        "raw_size_bytes": table.raw_bytes,
        "raw_digest": table.raw_digest,
        "frame_bytes": table.frame_bytes,
        "coding": "".join(frame.coding.value for frame in table.frames),
        "stored_bytes": [frame.stored_bytes for frame in table.frames],
    }


def _file_fields(file: FileEntry) -> dict[str, Any]:
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
        **({} if blob.frames is None else {"frames": _frame_fields(blob.frames)}),
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
    if version > FORMAT_VERSION or features not in ([], [ZSTD_FEATURE]):
        raise PackVersionError(
            f"{where}: written in format version {version}"
            + (f" with {features!r:.100}" if features != [] else "")
            + f", this layerpack reads up to {FORMAT_VERSION}; install a newer layerpack"
        )
    reader = ManifestReader()
    manifest = reader.manifest(document)
    problems = reader.problems or manifest_problems(manifest) or _digest_problems(raw)
    if problems:
        shown = "; ".join(problems[:_SHOWN_PROBLEMS])
        rest = len(problems) - _SHOWN_PROBLEMS
        more = f"; and {rest} more problems" if rest > 0 else ""
        raise PackError(f"{where}: {printable(shown)}{more}")
    return manifest


def _digest_problems(raw: bytes) -> list[str]:
    found = _DIGEST_LINE.search(raw)
    if found is None:
        return ["its own digest is missing; it was changed by hand or damaged"]
    if bytes_digest(raw[: found.start()] + raw[found.end() :]) != found[1].decode():
        return ["its content is not what its own digest says; it was changed by hand or damaged"]
    return []
