"""From a pack to tokens: where weights live, and how they arrive in time.

from layerpack.runtime import GenerateOptions, Model

with Model.open("out/") as model:
    for piece in model.stream("Why is the sky blue?", GenerateOptions(max_new_tokens=100)):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerpack.runtime.engine.options import GenerateOptions
    from layerpack.runtime.generate import Generation
    from layerpack.runtime.model import Model
    from layerpack.runtime.open_options import OpenOptions
    from layerpack.runtime.plan.plan import Limits

__all__ = ["GenerateOptions", "Generation", "Limits", "Model", "OpenOptions"]

_MODULES = {
    "GenerateOptions": "engine.options",
    "Generation": "generate",
    "Limits": "plan.plan",
    "Model": "model",
    "OpenOptions": "open_options",
}


def __getattr__(name: str) -> Any:
    """Each name is imported when it is asked for: they bring in torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
