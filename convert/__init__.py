"""Checkpoint in, pack out: `convert("Qwen/Qwen2.5-72B-Instruct", "out/")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerpack.convert.options import ConvertOptions

if TYPE_CHECKING:
    from layerpack.convert.api import convert

__all__ = ["ConvertOptions", "convert"]


def __getattr__(name: str) -> Any:
    """`convert` is imported when it is asked for: it brings in torch."""
    if name == "convert":
        from layerpack.convert.api import convert

        return convert
    raise AttributeError(name)
