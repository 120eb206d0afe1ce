"""One defect at a time in `layerpack.json`: each is named, with the file that has it."""

from __future__ import annotations

import json

import pytest
from support.packs.manifest_damage import (
    HEAD,
    L1,
    UP,
    Damage,
    Document,
    blob,
    drop,
    find,
    put,
    refused,
    same_tensor_twice,
    shift,
    state,
    swap_blobs,
    tensor,
    widen,
)

from layerpack.formats.blob.nf4 import STATE

DEFECTS: dict[str, tuple[Damage, str]] = {
    # the rules of the manifest as a whole
    "other format": (put("format", value="zip"), "not a layerpack manifest"),
    "version text": (put("format_version", value="1"), "format_version '1'"),
    "version zero": (put("format_version", value=0), "format_version 0"),
    "version true": (put("format_version", value=True), "format_version True"),
    "no producer": (lambda d: d.pop("producer"), "producer is missing"),
    "empty producer": (put("producer", value=""), "producer is missing or not valid"),
    "long text": (put("producer", value="x" * 4097), "producer is missing or not valid"),
    "no source": (lambda d: d.pop("source"), "source.kind is missing"),
    "source a list": (put("source", value=[]), "source.kind is missing"),
    "no source id": (put("source", "id", value=None), "source.id is missing"),
    "revision a number": (put("source", "revision", value=3), "source.revision"),
    "source file size": (
        lambda d: d["source"]["files"][0].update(size_bytes=-1),
        "source.files[0].size_bytes",
    ),
    "source file text": (lambda d: d["source"]["files"].append("x"), "source.files[1].name"),
    "no model": (lambda d: d.pop("model"), "model.architecture is missing"),
    "no layers": (put("model", "num_layers", value=0), "for 0 layers"),
    "model dtype": (put("model", "dtype", value="F8_E4M3"), "model dtype F8_E4M3"),
    "parameters 1.5": (put("model", "num_parameters", value=1.5), "model.num_parameters"),
    "too large": (put("model", "num_parameters", value=1 << 49), "model.num_parameters"),
    "no embedding": (put("model", "embedding", value="x"), "tensor x, named under model"),
    "no head": (put("model", "head", value="x"), "tensor x, named under model"),
    "head in a layer": (put("model", "head", value=UP), f"tensor {UP}, named under model"),
    "embedding elsewhere": (put("model", "embedding", value="lm_head.weight"), "is not in embed"),
    "int4": (put("quantization", "type", value="int4"), "quantization.type"),
    "none of it": (put("quantization", value={"type": "none"}), "is not quantised as"),
    "odd blocks": (put("quantization", "block_size", value=63), "block size 63"),
    "other blocks": (put("quantization", "block_size", value=128), "is not quantised as"),
    "double of one": (put("quantization", "double_quant", value=1), "quantization.double_quant"),
    "flat": (put("quantization", "double_quant", value=False), "is not quantised as"),
    "nested blocks": (put("quantization", "nested_block_size", value=128), "nested_block_size"),
    "head not nf4": (put("quantization", "head", value=True), "quantization.head is true"),
    # the order of the blobs
    "no blobs": (put("blobs", value=[]), "0 blobs for 2 layers"),
    "blobs an object": (put("blobs", value={}), "blobs is missing or not valid"),
    "blob a text": (lambda d: d["blobs"].append("x"), "blobs[4].file"),
    "a layer too few": (lambda d: d["blobs"].pop(1), "3 blobs for 2 layers"),
    "layers swapped": (swap_blobs, "blobs[1] should be layer 0 but is layer 1"),
    "role unknown": (blob(1, role="expert"), "blobs[1].role"),
    "role a list": (blob(1, role=["layer"]), "blobs[1].role"),
    "head not last": (blob(HEAD, role="embedding"), "blobs[3] should be head but is embedding"),
    "layer true": (blob(1, layer=True), "blobs[1].layer"),
    "embedding numbered": (blob(0, layer=0), "blobs[0] should be embedding"),
    # one blob
    "parent directory": (blob(1, file="../layer.safetensors"), "'../layer.safetensors' is not a"),
    "absolute": (blob(1, file="/etc/layer.safetensors"), "'/etc/layer.safetensors' is not a"),
    "backslash": (blob(1, file="..\\a.safetensors"), "is not a plain .safetensors name"),
    "line end": (blob(1, file="a.safetensors\n"), "is not a plain .safetensors name"),
    "hidden file": (blob(1, file=".safetensors"), "is not a plain .safetensors name"),
    "other ending": (blob(1, file="layer.bin"), "is not a plain .safetensors name"),
    "file twice": (blob(1, file="head.safetensors"), "head.safetensors is listed twice"),
    "digest": (blob(1, digest="sha256:00"), "layer-000.safetensors: digest 'sha256:00'"),
    "digest upper": (blob(1, digest="xxh3_128:" + "A" * 32), "is not an xxh3_128 digest"),
    "no tensors": (blob(1, tensors=[]), "layer-000.safetensors lists no tensors"),
    "ends early": (
        lambda d: blob(1, size_bytes=d["blobs"][1]["size_bytes"] - 1)(d),
        "layer-000.safetensors: tensors end at byte 12392, outside its 12391 bytes",
    ),
    "far too short": (blob(1, size_bytes=0), "outside its 0 bytes"),
    "bytes after": (
        lambda d: blob(1, size_bytes=d["blobs"][1]["size_bytes"] + 9)(d),
        "layer-000.safetensors: 9 bytes after the last tensor",
    ),
    "data at 0": (shift(L1, 0, -4096), "layer-001.safetensors: data begin at byte 0"),
    "data off page": (shift(L1, 0, 8), "layer-001.safetensors: data begin at byte 4104"),
    # one tensor
    "tensor a number": (lambda d: d["blobs"][L1]["tensors"].append(7), "blobs[2].tensors[14].name"),
    "no offset": (lambda d: find(d, UP).pop("offset_bytes"), "tensors[0].offset_bytes"),
    "offset negative": (tensor(UP, offset_bytes=-4096), "tensors[0].offset_bytes"),
    "offset huge": (tensor(UP, offset_bytes=1 << 60), "tensors[0].offset_bytes"),
    "offset beyond": (shift(L1, 0, 1 << 40, grow=False), "outside its 12392 bytes"),
    "shape deep": (tensor(UP, shape=[1] * 9), "tensors[0].shape"),
    "shape negative": (tensor(UP, shape=[-1, -1]), "tensors[0].shape"),
    "dtype unknown": (tensor(UP, dtype="U4"), f"{UP} has dtype 'U4', which is not known"),
    "dtype not of packs": (tensor(UP, dtype="F8_E4M3"), "dtype 'F8_E4M3', which is not known"),
    "length": (tensor(UP, length_bytes=7), f"{UP} has 7 bytes, not its shape's"),
    "overlap": (
        shift(L1, 3, -64),
        f"layer-001.safetensors: {UP}.quant_map overlaps",
    ),
    "hole": (shift(L1, 3, 64), "hole before model.layers.1.up.weight.quant_map"),
    "same name twice": (same_tensor_twice, "tensor model.embed.weight is listed twice"),
    "not of its layer": (
        tensor("model.layers.1.norm.weight", name="model.layers.10.norm.weight"),
        "layer-001.safetensors: model.layers.10.norm.weight does not begin with model.layers.1.",
    ),
    "codes off page": (
        widen(UP + STATE, 8),
        "down.weight is misaligned",
    ),
    "plain misaligned": (
        widen("model.layers.1.down.weight" + STATE, 4),
        "model.layers.1.steps is misaligned (byte 12292)",
    ),
    "embedding nf4": (tensor("model.embed.weight", nf4={}), "nf4.shape"),
    "embedding flat": (tensor("model.embed.weight", shape=[21 * 48]), "is not a matrix of 16"),
    "embedding of integers": (tensor("model.embed.weight", dtype="I16"), "is not a matrix of 16"),
    "head flat": (tensor("lm_head.weight", shape=[21 * 48]), "lm_head.weight is not a matrix"),
    "head of integers": (tensor("lm_head.weight", dtype="I16"), "is not a matrix of 16 or 32"),
    # one quantised weight
    "state missing": (lambda d: find(d, UP).pop("nf4"), f"{UP}.nested_absmax belongs to no"),
    "state null": (tensor(UP, nf4=None), "tensors[0].nf4.shape"),
    "state blocks": (state(block_size=65), f"{UP} has an unknown block size"),
    "state dtype": (state(dtype="I8"), f"{UP} has an unknown block size or dtype"),
    "state offset": (state(nested_offset=1e39), "tensors[0].nf4.nested_offset"),
    "state offset text": (state(nested_offset="0.5"), "tensors[0].nf4.nested_offset"),
    "state without offset": (
        state(nested_offset=None),
        ".absmax is U8 [54], should be F32",
    ),
    "vector": (state(shape=[72 * 48]), f"{UP} is not a matrix"),
    "empty matrix": (state(shape=[0, 48]), f"{UP} is not a matrix"),
    "other shape": (state(shape=[72, 50]), f"{UP} is U8 [1728, 1], should be U8 [1800, 1]"),
    "codes flat": (tensor(UP, shape=[1728]), f"{UP} is U8 [1728], should be U8 [1728, 1]"),
    "codes signed": (tensor(UP, dtype="I8"), f"{UP} is I8 [1728, 1], should be U8"),
    "no absmax": (drop(L1, UP + ".absmax"), f"layer-001.safetensors: {UP}.absmax is missing"),
    "no map": (drop(L1, UP + ".quant_map"), f"{UP}.quant_map is missing"),
    "state part short": (
        widen(UP + STATE, -1122),
        "quant_state.bitsandbytes__nf4 has the wrong dtype or shape",
    ),
    "state part signed": (
        tensor(UP + STATE, dtype="I8"),
        "quant_state.bitsandbytes__nf4 has the wrong dtype or shape",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_one_defect_is_named(defect: str, document: Document) -> None:
    damage, message = DEFECTS[defect]
    before = json.dumps(document)
    damage(document)
    assert json.dumps(document) != before
    assert message in refused(document)
