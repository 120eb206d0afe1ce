"""A bound of VRAM for the whole process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from layerpack.runtime.core.device_errors import failed_device_ignored
from layerpack.runtime.machine.machine import memory_fraction


@contextlib.contextmanager
def capped_vram(device: torch.device, vram_bytes: int | None) -> Iterator[None]:
    """Hold the process to so much VRAM for the length of the block (None, or a CPU: no bound)."""
    if device.type != "cuda" or vram_bytes is None:
        yield
        return
    before = memory_fraction(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, vram_bytes / total), device)
    try:
        yield
    finally:
        with failed_device_ignored():
            torch.cuda.set_per_process_memory_fraction(before, device)
