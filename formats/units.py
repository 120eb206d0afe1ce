"""Sizes: pages, element types, and how bytes are written for people."""

from __future__ import annotations

PAGE_BYTES = 4096
"""Alignment of blob data and packed weights: a memory page, and what direct reads accept."""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per element of each safetensors dtype that layerpack knows."""


def align_up(offset_bytes: int, alignment_bytes: int = PAGE_BYTES) -> int:
    """The next multiple of `alignment_bytes` at or after `offset_bytes`."""
    return -(-offset_bytes // alignment_bytes) * alignment_bytes


def num_elements(shape: tuple[int, ...]) -> int:
    """Product of the dimensions; 1 for a scalar."""
    count = 1
    for dimension in shape:
        count *= dimension
    return count


def human_bytes(count_bytes: int | float) -> str:
    """`452.8 MB`: powers of 1000, as disks and links are sold."""
    value = float(count_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.95 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
