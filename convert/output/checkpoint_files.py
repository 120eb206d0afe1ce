"""The pack's small files: what makes a directory of blobs a checkpoint that others can load."""

from __future__ import annotations

from typing import Any

from layerpack.convert.plan.plan import Action, ConversionPlan
from layerpack.formats.frames.table import FRAMES_SUFFIX
from layerpack.formats.jsontext import dump_json

_NOT_THE_PACKS = (
    "quantization_config",
    "compression_config",
    "quantization",
    "dtype",
    "torch_dtype",
)
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16"}


def index_json(plan: ConversionPlan) -> bytes:
    """`model.safetensors.index.json` of the pack, once it is plain if it is compressed."""
    weights = {
        entry.name: blob.file.removesuffix(FRAMES_SUFFIX)
        for blob in plan.blobs
        for entry in blob.layout.tensors
    }
    total = sum(entry.length_bytes for blob in plan.blobs for entry in blob.layout.tensors)
    return dump_json({"metadata": {"total_size": total}, "weight_map": weights})


def config_json(plan: ConversionPlan) -> bytes:
    """The model's config.json, with the dtype of 16-bit tensors, and how to read NF4."""
    config = {
        key: value for key, value in plan.structure.config.items() if key not in _NOT_THE_PACKS
    }
    dtype = _TORCH_NAMES[plan.structure.dtype]
    config.setdefault("architectures", [plan.structure.architecture])
    # transformers before 5 reads torch_dtype, later ones read both.
    config["torch_dtype"] = dtype
    if (how := plan.quantization) is not None:
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": how.double_quant,
            **_skipped(plan),
        }
    return dump_json(config)


def _skipped(plan: ConversionPlan) -> dict[str, Any]:
    """Which linear modules are not NF4, unless it is lm_head alone, as loaders assume."""
    linear = {p.name for p in plan.structure.parameters if p.linear}
    plain = [
        item.spec.name.removesuffix(".weight")
        for blob in plan.blobs
        for item in blob.items
        if item.action is Action.COPY and item.spec.name in linear
    ]
    output = plan.structure.output.removesuffix(".weight")
    if plan.structure.tied:
        plain.append(output)  # what it uses is the embedding's, so no item of its own
    if plain == [output]:
        return {}
    return {"llm_int8_skip_modules": plain}
