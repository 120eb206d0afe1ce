"""A pack in figures: its blobs, what they cost per parameter, and what one pass moves. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from layerpack.formats.manifest.facts import Blob, Manifest, Role

NF4 = "NF4"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobSummary:
    """One blob, or `count` layers in a row that are alike; sizes are those of each.

    `layers` is (first, last), None outside the layers. `weights` counts the tensors that the model
    sees by how they are stored (NF4, BF16 …); quantisation constants belong to their weight.
    `raw_bytes` is the size of the plain file, `file_bytes` unless the blob is compressed.
    """

    role: Role
    layers: tuple[int, int] | None
    files: tuple[str, str]
    count: int
    file_bytes: int
    raw_bytes: int
    num_parameters: int
    weights: tuple[tuple[str, int], ...]

    @property
    def bits_per_parameter(self) -> float:
        """Of the whole file, its header and padding included; 0 for a blob without parameters."""
        return 8 * self.file_bytes / self.num_parameters if self.num_parameters else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassBytes:
    """What one pass, and so one generated token, moves: every layer, then lm_head.

    Headers are left out, as a reader of the pack leaves them out. Of the embedding only the rows
    of the tokens at hand are read; a tied lm_head is the embedding's weight. `disk_bytes` are
    read for it: fewer, if the pack is compressed.
    """

    layer_bytes: int
    head_bytes: int
    disk_bytes: int

    @property
    def total_bytes(self) -> int:
        """Layers and lm_head."""
        return self.layer_bytes + self.head_bytes

    def link_s(self, gb_per_s: float) -> float:
        """How long one pass takes over a link of that speed, in units of 10**9 bytes."""
        return self.total_bytes / (gb_per_s * 1e9)

    def disk_s(self, gb_per_s: float) -> float:
        """How long a disk of that speed takes for it."""
        return self.disk_bytes / (gb_per_s * 1e9)


def summarise_blobs(blobs: Iterable[Blob]) -> tuple[BlobSummary, ...]:
    """One row for each blob, in the given order."""
    return tuple(_summary(blob) for blob in blobs)


def fold_layers(rows: Iterable[BlobSummary]) -> tuple[BlobSummary, ...]:
    """The same rows with runs of layers that differ in nothing but their number made one.

    Compressed layers differ in a few bytes, too: the row has their mean.
    """
    runs: list[list[BlobSummary]] = []
    for row in rows:
        if runs and runs[-1][-1].layers and row.layers and _shape(runs[-1][-1]) == _shape(row):
            runs[-1].append(row)
        else:
            runs.append([row])
    return tuple(_folded(run) for run in runs)


def pass_bytes(manifest: Manifest) -> PassBytes:
    """What a pass over the pack moves if nothing of it stays where it is computed."""
    head = [
        (blob, entry.offset_bytes, entry.length_bytes)
        for blob in (manifest.embedding, manifest.head)
        for entry in blob.tensors
        if entry.name == manifest.model.head
    ]
    layers = [
        (blob, blob.data_start_bytes, blob.raw_bytes - blob.data_start_bytes)
        for blob in manifest.layers
    ]
    return PassBytes(
        layer_bytes=sum(length for _, _, length in layers),
        head_bytes=sum(length for _, _, length in head),
        disk_bytes=sum(_stored_bytes(*part) for part in [*layers, *head]),
    )


def stored_as(blob: Blob) -> dict[str, str]:
    """How each weight of the blob is stored: its dtype, or NF4. Constants are left out."""
    return {
        entry.name: NF4 if entry.name in blob.nf4 else entry.dtype
        for entry in blob.tensors
        if entry.name not in blob.constants
    }


def _summary(blob: Blob) -> BlobSummary:
    kinds = list(stored_as(blob).values())
    return BlobSummary(
        role=blob.role,
        layers=None if blob.layer is None else (blob.layer, blob.layer),
        files=(blob.file, blob.file),
        count=1,
        file_bytes=blob.file_bytes,
        raw_bytes=blob.raw_bytes,
        num_parameters=blob.num_parameters,
        weights=tuple((kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)),
    )


def _stored_bytes(blob: Blob, offset_bytes: int, length_bytes: int) -> int:
    if blob.frames is None or not length_bytes:
        return length_bytes
    return blob.frames.stored_range(offset_bytes, length_bytes)[1]


def _folded(run: list[BlobSummary]) -> BlobSummary:
    first, last = run[0], run[-1]
    return replace(
        first,
        layers=(first.layers[0], last.layers[1]) if first.layers and last.layers else None,
        files=(first.files[0], last.files[1]),
        count=len(run),
        file_bytes=round(sum(row.file_bytes for row in run) / len(run)),
    )


def _shape(row: BlobSummary) -> tuple[object, ...]:
    return row.role, row.raw_bytes, row.num_parameters, row.weights
