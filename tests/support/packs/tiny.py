"""The smallest pack there can be, written by the formats layer alone, in milliseconds."""

from __future__ import annotations

from pathlib import Path

from support.packs.random_blob import write_random_blob

from layerpack.formats.blob.layout import Nf4Spec, PlainSpec
from layerpack.formats.digest import bytes_digest
from layerpack.formats.manifest.document import dump_manifest
from layerpack.formats.manifest.facts import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Model,
    Quantization,
    Role,
    SourceRecord,
)

SIDE = 16
_FILES = {"config.json": b"{}\n", "model.safetensors.index.json": b'{"weight_map": {}}\n'}


def write_tiny_pack(path: Path) -> Manifest:
    """A pack of one layer with one NF4 weight; its numbers are random, its files all listed."""
    path.mkdir()
    matrix = PlainSpec(name="embed.weight", dtype="BF16", shape=(SIDE, SIDE))
    weight = Nf4Spec(
        name="layers.0.up.weight", shape=(SIDE, SIDE), block_size=64, double_quant=True
    )
    norm = PlainSpec(name="layers.0.norm.weight", dtype="BF16", shape=(SIDE,))
    last = PlainSpec(name="norm.weight", dtype="BF16", shape=(SIDE,))
    blobs = (
        write_random_blob(path / "embed.safetensors", Role.EMBEDDING, None, matrix),
        write_random_blob(path / "layer-000.safetensors", Role.LAYER, 0, weight, norm),
        write_random_blob(path / "head.safetensors", Role.HEAD, None, last),
    )
    for name, data in _FILES.items():
        (path / name).write_bytes(data)
    manifest = Manifest(
        producer="tests",
        source=SourceRecord(kind="directory", id="random", revision=None, files=()),
        model=Model(
            architecture="Tiny",
            layers_path="layers",
            num_layers=1,
            dtype="BF16",
            embedding=matrix.name,
            head=matrix.name,
            num_parameters=sum(blob.num_parameters for blob in blobs),
        ),
        quantization=Quantization(block_size=64, double_quant=True, head=False),
        blobs=blobs,
        files=tuple(
            FileEntry(name=name, file_bytes=len(data), digest=bytes_digest(data))
            for name, data in _FILES.items()
        ),
    )
    (path / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
    return manifest
