"""The machine that the rows of `layerpack bench` share: what it is, and its memory between them."""

from __future__ import annotations

import gc
import os
import platform
from typing import Any

import torch

from layerpack.libraries.torch_api import empty_host_cache
from layerpack.runtime.core.device_errors import failed_device_ignored
from layerpack.runtime.machine.host_memory import host_memory


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
        empty_host_cache()
