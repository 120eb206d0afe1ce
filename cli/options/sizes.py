"""Sizes on the command line: `8GiB`, `7500MB`, `512M`."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "kib": 1 << 10,
    "kb": 1000,
    "m": 1 << 20,
    "mib": 1 << 20,
    "mb": 1000**2,
    "g": 1 << 30,
    "gib": 1 << 30,
    "gb": 1000**3,
    "t": 1 << 40,
    "tib": 1 << 40,
    "tb": 1000**4,
}
_MOST_BYTES = 1 << 62
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes in `text`; a bare letter counts in powers of 1024. Raises ValueError."""
    match = _PATTERN.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write 8GiB, 7500MB or 512M")
    size_bytes = float(match[1]) * _UNITS[match[2].lower()]
    if size_bytes > _MOST_BYTES:
        raise ValueError(f"{text!r} is more than any machine has; write 8GiB, 7500MB or 512M")
    return int(size_bytes)


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Bytes; a usage error otherwise."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as reason:
            self.fail(str(reason), param, ctx)


SIZE = _Size()
