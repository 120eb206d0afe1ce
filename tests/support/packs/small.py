"""A whole, valid pack of a few kilobytes from the formats' own writer; its codes are noise."""

from __future__ import annotations

from pathlib import Path

from support.packs.random_blob import write_random_blob

from layerpack.formats.blob.layout import Nf4Spec, PlainSpec
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

_VOCABULARY = 21


def write_small_pack(
    path: Path,
    *,
    num_layers: int = 2,
    double_quant: bool = True,
    tied: bool = False,
    hidden: int = 48,
    inner: int = 72,
) -> Manifest:
    """Write blobs and manifest (no config, no tokenizer) into `path`, which is made.

    The NF4 weights of a layer are (inner, hidden) and (hidden, inner).
    """
    path.mkdir(parents=True, exist_ok=True)
    embedding = PlainSpec(name="model.embed.weight", dtype="BF16", shape=(_VOCABULARY, hidden))
    norm = PlainSpec(name="model.norm.weight", dtype="BF16", shape=(hidden,))
    head = PlainSpec(name="lm_head.weight", dtype="BF16", shape=(_VOCABULARY, hidden))
    blobs = [write_random_blob(path / "embed.safetensors", Role.EMBEDDING, None, embedding)]
    for index in range(num_layers):
        prefix = f"model.layers.{index}."
        specs: list[PlainSpec | Nf4Spec] = [
            PlainSpec(name=prefix + "norm.weight", dtype="BF16", shape=(hidden,)),
            PlainSpec(name=prefix + "steps", dtype="I64", shape=()),
        ]
        specs += [
            Nf4Spec(name=prefix + name, shape=shape, block_size=64, double_quant=double_quant)
            for name, shape in (("up.weight", (inner, hidden)), ("down.weight", (hidden, inner)))
        ]
        file = path / f"layer-{index:03d}.safetensors"
        blobs.append(write_random_blob(file, Role.LAYER, index, *specs))
    last = [norm] if tied else [head, norm]
    blobs.append(write_random_blob(path / "head.safetensors", Role.HEAD, None, *last))
    manifest = Manifest(
        producer="tests",
        source=SourceRecord(
            kind="hub",
            id="org/small",
            revision="c" * 40,
            files=(FileEntry(name="model.safetensors", file_bytes=9, digest="sha256:00"),),
        ),
        model=Model(
            architecture="SmallForCausalLM",
            layers_path="model.layers",
            num_layers=num_layers,
            dtype="BF16",
            embedding=embedding.name,
            head=embedding.name if tied else head.name,
            num_parameters=sum(blob.num_parameters for blob in blobs),
        ),
        quantization=Quantization(block_size=64, double_quant=double_quant, head=False),
        blobs=tuple(blobs),
    )
    (path / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
    return manifest
