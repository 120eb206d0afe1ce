"""The smallest pack there can be, written by the formats layer alone, in milliseconds."""

from __future__ import annotations

import random
from pathlib import Path

from layerpack.formats import nf4
from layerpack.formats.blob import BlobWriter
from layerpack.formats.digest import bytes_digest
from layerpack.formats.layout import Nf4Spec, PlainSpec, layout_blob
from layerpack.formats.manifest import (
    MANIFEST_NAME,
    Blob,
    Manifest,
    Model,
    PackFile,
    Quantization,
    Role,
    Source,
)
from layerpack.formats.manifest_json import dump_manifest

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
        _write(path / "embed.safetensors", [matrix], Role.EMBEDDING, None),
        _write(path / "layer-000.safetensors", [weight, norm], Role.LAYER, 0),
        _write(path / "head.safetensors", [last], Role.HEAD, None),
    )
    for name, data in _FILES.items():
        (path / name).write_bytes(data)
    manifest = Manifest(
        producer="tests",
        source=Source(kind="directory", id="random", revision=None, files=()),
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
            PackFile(name=name, file_bytes=len(data), digest=bytes_digest(data))
            for name, data in _FILES.items()
        ),
    )
    (path / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
    return manifest


def _write(path: Path, specs: list[Nf4Spec | PlainSpec], role: Role, layer: int | None) -> Blob:
    layout = layout_blob(specs)
    states = {
        spec.name: nf4.Nf4State(
            shape=spec.shape, block_size=spec.block_size, dtype="BF16", nested_offset=0.125
        )
        for spec in specs
        if isinstance(spec, Nf4Spec)
    }
    chance = random.Random(path.name)
    with BlobWriter(path, layout) as writer:
        for entry in layout.tensors:
            if entry.name.endswith(nf4.STATE):
                state = states[entry.name.removesuffix(nf4.STATE)]
                writer.write(entry.name, nf4.encode_state(state, entry.length_bytes))
            else:
                writer.write(entry.name, chance.randbytes(entry.length_bytes))
    assert writer.digest is not None
    return Blob(
        role=role,
        layer=layer,
        file=path.name,
        file_bytes=layout.file_bytes,
        digest=writer.digest,
        tensors=layout.tensors,
        nf4=states,
    )
