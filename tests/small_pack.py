"""A whole, valid pack of a few kilobytes from the formats' own writer; its codes are noise."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from layerpack.formats import nf4
from layerpack.formats.blob import BlobWriter
from layerpack.formats.layout import Nf4Spec, PlainSpec, layout_blob
from layerpack.formats.manifest import (
    MANIFEST_NAME,
    Blob,
    Manifest,
    Model,
    Quantization,
    Role,
    Source,
    SourceFile,
)
from layerpack.formats.manifest_json import dump_manifest

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
    blobs = [_write(path / "embed.safetensors", [embedding], Role.EMBEDDING, None)]
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
        blobs.append(_write(path / f"layer-{index:03d}.safetensors", specs, Role.LAYER, index))
    last = [norm] if tied else [head, norm]
    blobs.append(_write(path / "head.safetensors", last, Role.HEAD, None))
    manifest = Manifest(
        producer="tests",
        source=Source(
            kind="hub",
            id="org/small",
            revision="c" * 40,
            files=(SourceFile(name="model.safetensors", file_bytes=9, digest="sha256:00"),),
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


def _write(
    path: Path, specs: list[PlainSpec | Nf4Spec] | list[PlainSpec], role: Role, layer: int | None
) -> Blob:
    layout = layout_blob(specs)
    rng = random.Random(path.name)
    states = {
        spec.name: nf4.Nf4State(
            shape=spec.shape,
            block_size=spec.block_size,
            dtype="BF16",
            nested_offset=0.625 if spec.double_quant else None,
        )
        for spec in specs
        if isinstance(spec, Nf4Spec)
    }
    with BlobWriter(path, layout) as writer:
        for entry in layout.tensors:
            if entry.name.endswith(nf4.STATE):
                state = states[entry.name.removesuffix(nf4.STATE)]
                writer.write(entry.name, nf4.encode_state(state, entry.length_bytes))
            elif entry.dtype == "F32":
                values = [rng.random() for _ in range(entry.length_bytes // 4)]
                writer.write(entry.name, struct.pack(f"<{len(values)}f", *values))
            else:
                writer.write(entry.name, rng.randbytes(entry.length_bytes))
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
