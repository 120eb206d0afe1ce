"""What a pack with a model's true shapes consists of: its blobs' tensors, and its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from layerpack.formats.blob.layout import Nf4Spec, PlainSpec
from layerpack.formats.blob.nf4 import Nf4State
from layerpack.formats.manifest.facts import (
    Blob,
    FileEntry,
    Manifest,
    Model,
    Quantization,
    Role,
    SourceRecord,
)

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobShape:
    """A blob to be: its file's name, its part of the model, its tensors in the order of use."""

    file: str
    role: Role
    layer: int | None
    specs: list[Nf4Spec | PlainSpec]

    def states(self, nested_offset: float) -> dict[str, Nf4State]:
        """The quantisation state of each NF4 weight."""
        return {
            spec.name: Nf4State(
                shape=spec.shape,
                block_size=spec.block_size,
                dtype="BF16",
                nested_offset=nested_offset if spec.double_quant else None,
            )
            for spec in self.specs
            if isinstance(spec, Nf4Spec)
        }


def blob_shapes(config: dict[str, Any]) -> Iterator[BlobShape]:
    """Embedding, layers and head of the model that a config.json describes."""
    hidden = config["hidden_size"]
    embedding, head = (
        PlainSpec(name=name, dtype="BF16", shape=(config["vocab_size"], hidden))
        for name in (_EMBEDDING, _HEAD)
    )
    norm = PlainSpec(name="model.norm.weight", dtype="BF16", shape=(hidden,))
    yield BlobShape(file="embed.safetensors", role=Role.EMBEDDING, layer=None, specs=[embedding])
    for layer in range(config["num_hidden_layers"]):
        yield BlobShape(
            file=f"layer-{layer:03d}.safetensors",
            role=Role.LAYER,
            layer=layer,
            specs=_layer_specs(config, f"model.layers.{layer}."),
        )
    yield BlobShape(file="head.safetensors", role=Role.HEAD, layer=None, specs=[head, norm])


def manifest_of(
    config: dict[str, Any], source: str, blobs: Sequence[Blob], files: Sequence[FileEntry] = ()
) -> Manifest:
    """The manifest of a pack of these blobs, made by no conversion; `source` says what it is."""
    return Manifest(
        producer="layerpack benchmarks",
        source=SourceRecord(kind="directory", id=source, revision=None, files=()),
        model=Model(
            architecture=config["architectures"][0],
            layers_path="model.layers",
            num_layers=config["num_hidden_layers"],
            dtype="BF16",
            embedding=_EMBEDDING,
            head=_HEAD,
            num_parameters=sum(blob.num_parameters for blob in blobs),
        ),
        quantization=Quantization(block_size=64, double_quant=True, head=False),
        blobs=tuple(blobs),
        files=tuple(files),
    )


def _layer_specs(config: dict[str, Any], prefix: str) -> list[Nf4Spec | PlainSpec]:
    """The tensors of one decoder layer, in the order of use; names begin with `prefix`."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * width
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    specs: list[Nf4Spec | PlainSpec] = [
        Nf4Spec(name=f"{prefix}{name}.weight", shape=shape, block_size=64, double_quant=True)
        for name, shape in shapes.items()
    ]
    if config["model_type"] == "qwen2":
        specs += [
            PlainSpec(
                name=f"{prefix}self_attn.{name}.bias",
                dtype="BF16",
                shape=(shapes[f"self_attn.{name}"][0],),
            )
            for name in ("q_proj", "k_proj", "v_proj")
        ]
    specs += [
        PlainSpec(name=f"{prefix}{name}.weight", dtype="BF16", shape=(hidden,))
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    return specs
