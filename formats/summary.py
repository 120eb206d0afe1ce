"""A pack in figures: its blobs, what they cost per parameter, and what one pass moves. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from layerpack.formats.manifest import Blob, Manifest, Role
from layerpack.formats.nf4 import SUFFIXES

NF4 = "NF4"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobSummary:
    """One blob, or `count` layers in a row that are alike; sizes are those of each.

    `layers` is (first, last), None outside the layers. `weights` counts the tensors that the model
    sees by how they are stored (NF4, BF16 …); quantisation constants belong to their weight.
    """

    role: Role
    layers: tuple[int, int] | None
    files: tuple[str, str]
    count: int
    file_bytes: int
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
    of the tokens at hand are read; a tied lm_head is the embedding's weight.
    """

    layer_bytes: int
    head_bytes: int

    @property
    def total_bytes(self) -> int:
        """Layers and lm_head."""
        return self.layer_bytes + self.head_bytes

    def seconds(self, gb_per_s: float) -> float:
        """How long one pass takes over a link of that speed, in units of 10**9 bytes."""
        return self.total_bytes / (gb_per_s * 1e9)


def summarise_blobs(blobs: Iterable[Blob]) -> tuple[BlobSummary, ...]:
    """One row for each blob, in the given order."""
    return tuple(_summary(blob) for blob in blobs)


def fold_layers(rows: Iterable[BlobSummary]) -> tuple[BlobSummary, ...]:
    """The same rows with runs of layers that differ in nothing but their number made one."""
    folded: list[BlobSummary] = []
    for row in rows:
        last = folded[-1] if folded else None
        if last is not None and last.layers and row.layers and _shape(last) == _shape(row):
            folded[-1] = replace(
                last,
                layers=(last.layers[0], row.layers[1]),
                files=(last.files[0], row.files[1]),
                count=last.count + row.count,
            )
        else:
            folded.append(row)
    return tuple(folded)


def pass_bytes(manifest: Manifest) -> PassBytes:
    """What a pass over the pack moves if nothing of it stays where it is computed."""
    head_bytes = sum(
        entry.length_bytes
        for blob in (manifest.embedding, manifest.head)
        for entry in blob.tensors
        if entry.name == manifest.model.head
    )
    return PassBytes(
        layer_bytes=sum(blob.file_bytes - blob.data_start_bytes for blob in manifest.layers),
        head_bytes=head_bytes,
    )


def stored_as(blob: Blob) -> dict[str, str]:
    """How each weight of the blob is stored: its dtype, or NF4. Constants are left out."""
    constants = {name + suffix for name in blob.nf4 for suffix in SUFFIXES}
    return {
        entry.name: NF4 if entry.name in blob.nf4 else entry.dtype
        for entry in blob.tensors
        if entry.name not in constants
    }


def _summary(blob: Blob) -> BlobSummary:
    kinds = list(stored_as(blob).values())
    return BlobSummary(
        role=blob.role,
        layers=None if blob.layer is None else (blob.layer, blob.layer),
        files=(blob.file, blob.file),
        count=1,
        file_bytes=blob.file_bytes,
        num_parameters=blob.num_parameters,
        weights=tuple((kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)),
    )


def _shape(row: BlobSummary) -> tuple[object, ...]:
    return row.role, row.file_bytes, row.num_parameters, row.weights
