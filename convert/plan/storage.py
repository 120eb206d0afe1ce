"""How a checkpoint stores its weights: in 16 or 32 bits, or already quantised.

The tensors decide; a config only adds what they do not tell. Configs are left behind by training,
and some makers keep the facts in a file of their own, or nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerpack.convert.source.protocol import SourceTensor
from layerpack.convert.source.small_files import QUANTISATION_NAMES
from layerpack.formats.blob import nf4
from layerpack.formats.errors import SourceError, UnsupportedError
from layerpack.formats.jsontext import parse_json
from layerpack.formats.units import num_elements
from layerpack.libraries.dtypes import FLOAT_DTYPES

_FP8 = "F8_E4M3"
_SCALE_DTYPES = FLOAT_DTYPES | {"F8_E8M0", "U8"}
"""What scales may be stored in; U8 are the bytes of F8_E8M0."""
_SCALES = ("_scale_inv", "_scale")
_ACTIVATION_SCALES = ("input_scale", "output_scale", "activation_scale")
"""Beside a weight, for methods that quantise what goes in and comes out as well: no part of it."""

_EVIDENCE = {
    r"quant_state\.bitsandbytes__fp4$": "bitsandbytes in 4 bit fp4",
    r"\.SCB$": "bitsandbytes in 8 bit",
    r"\.qweight$": "GPTQ or AWQ",
    r"\.weight_packed$": "compressed-tensors' packed integers",
    r"\.weight_scale_2$": "NVFP4",
    r"_blocks$": "MXFP4",
    r"\.W_q$": "HQQ",
    r"\.weight_qdata$": "torchao",
    r"\.scales$": "MLX",
}
"""What a checkpoint's tensors are called where they are quantised in a way that is not read."""
_METHODS = dict(zip(QUANTISATION_NAMES, ("modelopt", "gptq", "awq"), strict=True))
_FACTS = "config.json or a file beside it says that the weights are quantised with"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The tensor `name` multiplies a weight's blocks of `block` (rows, columns) elements."""

    name: str
    block: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """`scales` by the name of the FP8 weight that they are of.

    `nf4` says that weights with bitsandbytes' constants beside them are NF4 already, and
    `skipped_modules` which modules transformers must then leave alone (None: its default).
    `constants` are tensors that go with quantised weights; `notes` is what to tell the user.
    """

    nf4: bool = False
    scales: Mapping[str, Scale]
    skipped_modules: tuple[str, ...] | None = None
    constants: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def find_storage(
    config: Mapping[str, Any],
    tensors: Mapping[str, SourceTensor],
    config_dir: Path,
    *,
    where: str,
) -> Storage:
    """What config.json and the other files of `config_dir` say, and the headers of all tensors.

    Raises UnsupportedError or SourceError by name.
    """
    facts = _stated(config, config_dir, where)
    method = _method(facts)
    quantised = [name.removesuffix(nf4.STATE) for name in tensors if name.endswith(nf4.STATE)]
    if quantised:
        return _nf4(facts, quantised, tensors, where)
    _refuse_other_methods(tensors, method, where)
    weights = [tensor for tensor in tensors.values() if tensor.dtype == _FP8]
    if weights:
        block = _stated_block(facts)
        scales = {t.name: scale for t in weights if (scale := _scale(t, tensors, block, where))}
        beside = {
            name.rpartition(".")[0] + "." + suffix
            for name in scales
            for suffix in _ACTIVATION_SCALES
        }
        return Storage(
            scales=scales,
            constants=frozenset(scale.name for scale in scales.values())
            | (beside & tensors.keys()),
        )
    if method is None:
        return Storage(scales={})
    if method != "bitsandbytes":
        # Some methods work on 16-bit weights while a model runs: not to be left out in silence.
        raise UnsupportedError(
            f"{where}: {_FACTS} {method!r}, but no weight is stored so; if they are plain 16-bit "
            "weights, take that out"
        )
    return Storage(
        scales={},
        notes=(
            "config.json speaks of bitsandbytes, but the weights are not quantised yet; they are "
            "now, as those of any 16-bit checkpoint",
        ),
    )


def _stated(config: Mapping[str, Any], config_dir: Path, where: str) -> Mapping[str, Any]:
    """What the checkpoint says of its quantisation, in whichever file; {} if nothing."""
    for key in ("quantization_config", "compression_config", "quantization"):
        fields = config.get(key)
        if fields is None:
            continue
        if not isinstance(fields, dict):
            raise UnsupportedError(f"{where}: {key} is not an object")
        # MLX writes its facts, without a name, under two keys.
        return {"quant_method": "mlx", **fields} if "quantization" in config else fields
    for name, method in _METHODS.items():
        try:
            fields = parse_json((config_dir / name).read_bytes())
        except OSError:
            continue
        except ValueError as reason:
            raise SourceError(f"{config_dir / name}: not valid JSON ({reason})") from None
        if isinstance(fields, dict):
            return {"quant_method": method, **(fields.get("quantization") or fields)}
    return {}


def _method(facts: Mapping[str, Any]) -> str | None:
    method = facts.get("quant_method")
    if method is None and (facts.get("load_in_4bit") or facts.get("load_in_8bit")):
        return "bitsandbytes"
    if method is None and facts:
        return "a method without name"
    return None if method is None else str(method)


def _refuse_other_methods(
    tensors: Mapping[str, SourceTensor], method: str | None, where: str
) -> None:
    for pattern, name in _EVIDENCE.items():
        found = next((tensor for tensor in tensors if re.search(pattern, tensor)), None)
        if found is None:
            continue
        stated = "" if method is None or method in name else f" (config.json: {method!r})"
        raise UnsupportedError(
            f"{where}: already quantised with {name}{stated}, as {found} shows, which is not "
            "supported; convert the 16-bit checkpoint instead"
        )


def _nf4(
    facts: Mapping[str, Any],
    quantised: list[str],
    tensors: Mapping[str, SourceTensor],
    where: str,
) -> Storage:
    if facts.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise UnsupportedError(f"{where}: bnb_4bit_quant_storage must be uint8 to be converted")
    skipped = facts.get("llm_int8_skip_modules")
    parts = {name + suffix for name in quantised for suffix in nf4.SUFFIXES}
    return Storage(
        nf4=True,
        scales={},
        skipped_modules=tuple(map(str, skipped)) if isinstance(skipped, list) else None,
        constants=frozenset(parts & tensors.keys()),
    )


def _scale(
    weight: SourceTensor,
    tensors: Mapping[str, SourceTensor],
    stated: tuple[int, int] | None,
    where: str,
) -> Scale | None:
    """The scale of an FP8 weight: one for all of it, one a row, or one a block; None: it has none.

    What computes with them: compressed-tensors, fbgemm, modelopt, transformers' fp8 and DeepSeek.
    """
    found = next((tensors[n] for s in _SCALES if (n := weight.name + s) in tensors), None)
    if found is None:
        return None
    if found.dtype not in _SCALE_DTYPES:
        raise UnsupportedError(
            f"{where}: {found.name} is {found.dtype}, which are no scales of FP8 weights"
        )
    if len(weight.shape) == 2:
        rows, columns = weight.shape
        if num_elements(found.shape) == 1:
            return Scale(name=found.name, block=(rows, columns))
        if found.shape in ((rows,), (rows, 1)):
            return Scale(name=found.name, block=(1, columns))
        if stated and found.shape == (-(-rows // stated[0]), -(-columns // stated[1])):
            return Scale(name=found.name, block=stated)
        if not stated and len(found.shape) == 2:
            steps = [
                side // max(1, count) for side, count in zip(weight.shape, found.shape, strict=True)
            ]
            if [count * step for count, step in zip(found.shape, steps, strict=True)] == [
                rows,
                columns,
            ]:
                return Scale(name=found.name, block=(steps[0], steps[1]))
    blocks = f"blocks of {list(stated)}" if stated else "rows or even blocks"
    raise SourceError(
        f"{where}: {found.name} has the shape {list(found.shape)}, which fits no {blocks} of "
        f"{weight.name}, {list(weight.shape)}"
    )


def _stated_block(facts: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) that share a scale, as transformers or compressed-tensors state it."""
    block = facts.get("weight_block_size")
    groups = facts.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        how = group.get("weights") if isinstance(group, dict) else None
        if isinstance(how, dict):
            size = how.get("group_size")
            block = how.get("block_structure") or ([1, size] if size else None) or block
    if (
        isinstance(block, list)
        and len(block) == 2
        and all(type(side) is int and 0 < side <= 1 << 16 for side in block)
    ):
        return block[0], block[1]
    return None
