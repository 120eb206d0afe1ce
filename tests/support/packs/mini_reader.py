"""A reader of packs made from docs/format.md alone: no layerpack, no torch, plain Python.

It is the page's proof: what it decodes must be what bitsandbytes decodes. Slow, and for one weight
at a time.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

PAGE = 4096
FLOAT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def read_manifest(pack: Path) -> dict[str, Any]:
    """layerpack.json of a pack that this reader understands."""
    manifest: dict[str, Any] = json.loads((pack / "layerpack.json").read_text(encoding="utf-8"))
    assert manifest["format"] == "layerpack"
    assert manifest["format_version"] == 1 and manifest.get("features", []) == []
    return manifest


def read_blob(pack: Path, blob: dict[str, Any]) -> bytes:
    """A blob's bytes, its header compared with the manifest."""
    raw = (pack / str(blob["file"])).read_bytes()
    assert len(raw) == blob["size_bytes"]
    (length,) = struct.unpack("<Q", raw[:8])
    assert (8 + length) % PAGE == 0 and length <= len(raw) - 8
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    position = 8 + length
    for tensor in blob["tensors"]:
        stored = header.pop(tensor["name"])
        assert (stored["dtype"], stored["shape"]) == (tensor["dtype"], tensor["shape"])
        begin, end = (8 + length + offset for offset in stored["data_offsets"])
        assert begin == position == tensor["offset_bytes"]
        assert end - begin == tensor["length_bytes"]
        position = end
    assert not header and position == len(raw)
    return raw


def decode(raw: bytes, blob: dict[str, Any], name: str) -> bytes:
    """The NF4 weight `name`: the bytes of its elements, row-major, in the dtype of its state."""
    tensors = {tensor["name"]: tensor for tensor in blob["tensors"]}
    state = tensors[name]["nf4"]
    assert tensors[name]["offset_bytes"] % PAGE == 0
    assert _own_state(_bytes_of(raw, tensors[name + ".quant_state.bitsandbytes__nf4"])) == state

    def floats(suffix: str) -> tuple[float, ...]:
        part = _bytes_of(raw, tensors[name + suffix])
        return struct.unpack(f"<{len(part) // 4}f", part)

    if state["nested_offset"] is None:
        absmax = floats(".absmax")
    else:
        nested_map, nested_absmax = floats(".nested_quant_map"), floats(".nested_absmax")
        offset = _f32(state["nested_offset"])
        absmax = tuple(
            _f32(_f32(nested_map[code] * nested_absmax[k // 256]) + offset)
            for k, code in enumerate(_bytes_of(raw, tensors[name + ".absmax"]))
        )
    quant_map, codes = floats(".quant_map"), _bytes_of(raw, tensors[name])
    out = bytearray()
    for i in range(state["shape"][0] * state["shape"][1]):
        code = codes[i // 2] & 15 if i % 2 else codes[i // 2] >> 4
        value = _f32(quant_map[code] * absmax[i // state["block_size"]])
        out += _to_dtype(value, state["dtype"])
    return bytes(out)


def _own_state(raw: bytes) -> dict[str, Any]:
    """The state inside the blob, in the words of the manifest."""
    own = json.loads(raw)
    assert own["quant_type"] == "nf4"
    assert own.get("nested_blocksize", 256) == 256 and own.get("nested_dtype") in (None, "float32")
    dtype = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[own["dtype"]]
    return {
        "shape": own["shape"],
        "dtype": dtype,
        "block_size": own["blocksize"],
        "nested_offset": own.get("nested_offset"),
    }


def _bytes_of(raw: bytes, tensor: dict[str, Any]) -> bytes:
    return raw[tensor["offset_bytes"] : tensor["offset_bytes"] + tensor["length_bytes"]]


def _f32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)


def _to_dtype(value: float, dtype: str) -> bytes:
    if dtype == "F32":
        return struct.pack("<f", value)
    if dtype == "F16":
        return struct.pack("<e", value)
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
