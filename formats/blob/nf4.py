"""NF4 as bitsandbytes stores it: the parts of one quantised weight, their sizes, the state's JSON.

A weight of `n` elements is cut, in row-major order, into blocks of `block_size`; each block is
scaled by its largest absolute value (absmax) and each element becomes the nearest of 16 codes,
two to a byte, the first in the high nibble. With double quantisation the float32 absmax values,
less their mean (`nested_offset`), are themselves stored as 8-bit codes in blocks of 256.
Source: QLoRA, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

from layerpack.formats.blob.header import is_shape
from layerpack.formats.errors import PackError
from layerpack.formats.jsontext import parse_json
from layerpack.formats.units import num_elements

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
STATE_RESERVED_BYTES = 320
"""Room kept for the state's JSON (about 170 bytes), so a layout depends on shapes alone."""

ABSMAX = ".absmax"
QUANT_MAP = ".quant_map"
NESTED_ABSMAX = ".nested_absmax"
NESTED_QUANT_MAP = ".nested_quant_map"
STATE = ".quant_state.bitsandbytes__nf4"
SUFFIXES = (ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP, STATE)

_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_FROM_TORCH = {name: dtype for dtype, name in _TORCH_NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4State:
    """What, beside the codes, one quantised weight needs to be read back.

    `shape` is (out_features, in_features); `dtype` what it dequantises to (BF16, F16, F32);
    `nested_offset` is None without double quantisation, else the mean taken off the absmax.
    """

    shape: tuple[int, ...]
    block_size: int
    dtype: str
    nested_offset: float | None

    @property
    def double_quant(self) -> bool:
        """Whether the absmax values are themselves quantised."""
        return self.nested_offset is not None


def packed_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of the codes: two elements to a byte."""
    return (num_elements(shape) + 1) // 2


def num_blocks(shape: tuple[int, ...], block_size: int) -> int:
    """Number of absmax values; the last block may be partial."""
    return -(-num_elements(shape) // block_size)


def parts(
    name: str, shape: tuple[int, ...], *, block_size: int, double_quant: bool
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of the tensors that store the weight `name`, in file order.

    The state's JSON, last, is listed with its reserved length; a layout may grow it. The float32
    parts follow the codes at once: their alignment then depends only on the number of codes.
    """
    blocks = num_blocks(shape, block_size)
    result: list[tuple[str, str, tuple[int, ...]]] = [(name, "U8", (packed_bytes(shape), 1))]
    if double_quant:
        nested = -(-blocks // NESTED_BLOCK_SIZE)
        result += [
            (name + NESTED_ABSMAX, "F32", (nested,)),
            (name + NESTED_QUANT_MAP, "F32", (256,)),
            (name + QUANT_MAP, "F32", (16,)),
            (name + ABSMAX, "U8", (blocks,)),
        ]
    else:
        result += [(name + QUANT_MAP, "F32", (16,)), (name + ABSMAX, "F32", (blocks,))]
    return [*result, (name + STATE, "U8", (STATE_RESERVED_BYTES,))]


def encode_state(state: Nf4State, length_bytes: int) -> bytes:
    """The state as bitsandbytes' JSON, padded with spaces to `length_bytes`."""
    fields: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": state.block_size,
        "dtype": _TORCH_NAMES[state.dtype],
        "shape": list(state.shape),
    }
    if state.nested_offset is not None:
        fields |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": state.nested_offset,
        }
    text = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > length_bytes:
        raise ValueError(f"quantisation state of {len(text)} bytes in {length_bytes}")
    return text.ljust(length_bytes)


def decode_state(raw: bytes, *, where: str) -> Nf4State:
    """The state out of the bytes of a `.quant_state.bitsandbytes__nf4` tensor. Raises PackError."""
    try:
        fields = parse_json(raw)
    except ValueError as reason:
        raise PackError(f"{where}: the quantisation state is not valid JSON ({reason})") from None
    if not isinstance(fields, dict) or fields.get("quant_type") != "nf4":
        raise PackError(f"{where}: the quantisation state is not of type nf4")
    block_size, dtype, shape = fields.get("blocksize"), fields.get("dtype"), fields.get("shape")
    if block_size not in BLOCK_SIZES or type(block_size) is not int:
        raise PackError(f"{where}: block size {block_size!r} is not one of {BLOCK_SIZES}")
    if (
        not isinstance(dtype, str)
        or dtype not in _FROM_TORCH
        or not (isinstance(shape, list) and is_shape(shape))
    ):
        raise PackError(f"{where}: dtype or shape in the quantisation state is not valid")
    offset = None
    if "nested_blocksize" in fields:
        offset = fields.get("nested_offset")
        if fields["nested_blocksize"] != NESTED_BLOCK_SIZE or not is_finite(offset):
            raise PackError(f"{where}: nested_blocksize or nested_offset is not valid")
    return Nf4State(
        shape=tuple(shape),
        block_size=block_size,
        dtype=_FROM_TORCH[dtype],
        nested_offset=None if offset is None else float(offset),
    )


def is_finite(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return type(value) in (int, float) and abs(value) < 1e38 and math.isfinite(value)


NF4_CODES: tuple[float, ...] = struct.unpack(
    "<16f",
    struct.pack(
        "<16f",
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)
"""The 16 values, ascending, exactly as float32."""
