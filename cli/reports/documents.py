"""What `layerpack inspect --json` prints: bytes, counts and seconds as plain numbers."""

from __future__ import annotations

from typing import Any

from layerpack.formats.manifest.facts import Blob, Manifest
from layerpack.formats.summary import pass_bytes, stored_as, summarise_blobs


def pack_document(
    manifest: Manifest, *, tensors: bool, link_gb_s: float, disk_gb_s: float
) -> dict[str, Any]:
    """A pack, whether it is there or only planned. Every blob is listed; tensors on request."""
    model, source, moved = manifest.model, manifest.source, pass_bytes(manifest)
    num_parameters = sum(blob.num_parameters for blob in manifest.blobs)
    how = manifest.quantization
    return {
        "producer": manifest.producer,
        "model": {
            "architecture": model.architecture,
            "num_layers": model.num_layers,
            "num_parameters": model.num_parameters,
            "dtype": model.dtype,
            "tied": model.tied,
        },
        "source": {
            "kind": source.kind,
            "id": source.id,
            "revision": source.revision,
            "num_files": len(source.files),
            "total_bytes": sum(file.file_bytes for file in source.files),
        },
        "quantization": how
        and {
            "type": "nf4",
            "block_size": how.block_size,
            "double_quant": how.double_quant,
            "head": how.head,
            "calibration": how.calibration
            and {
                "digest": how.calibration.digest,
                "text": how.calibration.text,
                "num_tokens": how.calibration.num_tokens,
                "num_weights": how.calibration.num_weights,
            },
        },
        "compression": _compression_fields(manifest),
        "blobs": [_blob_fields(blob, tensors) for blob in manifest.blobs],
        "total_bytes": manifest.total_bytes,
        "bits_per_parameter": 8 * manifest.total_bytes / max(1, num_parameters),
        "pass": {
            "total_bytes": moved.total_bytes,
            "layer_bytes": moved.layer_bytes,
            "head_bytes": moved.head_bytes,
            "disk_bytes": moved.disk_bytes,
            "link_gb_s": link_gb_s,
            "disk_gb_s": disk_gb_s,
            "from_host_s": moved.link_s(link_gb_s),
            "from_disk_s": max(moved.link_s(link_gb_s), moved.disk_s(disk_gb_s)),
        },
    }


def _compression_fields(manifest: Manifest) -> dict[str, Any] | None:
    used = manifest.compression
    if used is None:
        return None
    return {
        "type": "zstd",
        "level": used.level,
        "library": used.library,
        "raw_bytes": manifest.raw_bytes,
        "ratio": manifest.total_bytes / max(1, manifest.raw_bytes),
    }


def _blob_fields(blob: Blob, tensors: bool) -> dict[str, Any]:
    (row,) = summarise_blobs([blob])
    fields: dict[str, Any] = {
        "role": blob.role.value,
        "layer": blob.layer,
        "file": blob.file,
        "size_bytes": blob.file_bytes,
        "raw_size_bytes": blob.raw_bytes,
        "num_parameters": row.num_parameters,
        "bits_per_parameter": row.bits_per_parameter,
        "weights": dict(row.weights),
    }
    if tensors:
        fields["tensors"] = _tensor_fields(blob)
    return fields


def _tensor_fields(blob: Blob) -> list[dict[str, Any]]:
    kinds = stored_as(blob)
    listed = []
    for entry in blob.tensors:
        state = blob.nf4.get(entry.name)
        listed.append(
            {
                "name": entry.name,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "offset_bytes": entry.offset_bytes,
                "length_bytes": entry.length_bytes,
                "stored_as": kinds.get(entry.name, "constants"),
                "weight_shape": list(state.shape) if state else None,
            }
        )
    return listed
