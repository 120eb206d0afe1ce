"""How a checkpoint stores its weights: in 16 or 32 bits, or already quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from layerpack.formats.errors import UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """`fp8_block` is (rows, columns) that share a scale, for FP8 checkpoints; else None.

    `nf4` says that weights with bitsandbytes' constants beside them are NF4 already, and
    `skipped_modules` which modules transformers must then leave alone (None: its default).
    """

    nf4: bool = False
    fp8_block: tuple[int, int] | None = None
    skipped_modules: tuple[str, ...] | None = None


def find_storage(config: Mapping[str, Any], *, where: str) -> Storage:
    """What `quantization_config` of a config.json says. Raises UnsupportedError by name."""
    fields = config.get("quantization_config", config.get("compression_config"))
    if fields is None:
        return Storage()
    if not isinstance(fields, dict):
        raise UnsupportedError(f"{where}: quantization_config is not an object")
    method = fields.get("quant_method")
    if method is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        method = "bitsandbytes"
    if method == "bitsandbytes":
        return _bitsandbytes(fields, where)
    if method == "fp8":
        block = fields.get("weight_block_size")
        if not _is_block(block):
            raise UnsupportedError(
                f"{where}: FP8 without weight_block_size is not supported; "
                "convert the 16-bit checkpoint instead"
            )
        return Storage(fp8_block=(block[0], block[1]))
    raise UnsupportedError(
        f"{where}: already quantised with {method!r}, which is not supported; "
        "convert the 16-bit checkpoint instead"
    )


def _bitsandbytes(fields: Mapping[str, Any], where: str) -> Storage:
    quant_type = fields.get("bnb_4bit_quant_type", "fp4")
    if not fields.get("load_in_4bit") or quant_type != "nf4":
        found = f"4 bit {quant_type}" if fields.get("load_in_4bit") else "8 bit"
        raise UnsupportedError(
            f"{where}: already quantised with bitsandbytes in {found}; of its kinds only NF4 is "
            "supported; convert the 16-bit checkpoint instead"
        )
    if fields.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise UnsupportedError(f"{where}: bnb_4bit_quant_storage must be uint8 to be converted")
    skipped = fields.get("llm_int8_skip_modules")
    return Storage(
        nf4=True,
        skipped_modules=tuple(map(str, skipped)) if isinstance(skipped, list) else None,
    )


def _is_block(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(side) is int and 0 < side <= 1 << 16 for side in value)
    )
