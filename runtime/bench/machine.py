"""The machine that the rows of `layerpack bench` share: what it is, and its memory between them."""

from __future__ import annotations

import gc
import os
import platform
from typing import Any

import torch

from layerpack.runtime.core.device_errors import failed_device_ignored
from layerpack.runtime.machine.machine import host_memory


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_cores": os.cpu_count(),
        "host_free_bytes": host_memory()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def let_go(device: torch.device) -> None:
    """Give back what a row's allocators keep, so that rows do not starve each other."""
    gc.collect()
    if device.type != "cuda":
        return
    with failed_device_ignored():
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        _empty_host_cache()


def _empty_host_cache() -> None:
    # What tensor.pin_memory() took is kept as well; before 2.13 torch has no public way to let go.
    empty = getattr(torch.accelerator, "empty_host_cache", None)
    if empty is None:
        empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()
