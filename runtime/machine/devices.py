"""Devices of this machine, and how much of their memory this process may take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from layerpack.formats.errors import CapacityError
from layerpack.runtime.core.device_errors import failed_device_ignored


def pick_device(wanted: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises CapacityError if there is no such device."""
    if wanted == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise CapacityError(f"device {wanted!r} is not known; use auto, cpu or cuda") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise CapacityError(f"no device {wanted}: this machine has {count} CUDA devices")
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise CapacityError(f"device {wanted!r} is not supported; use auto, cpu or cuda")
    return device


def vram_free_bytes(device: torch.device, cap_bytes: int | None = None) -> int:
    """Bytes that this process may still allocate on `device`.

    The memory fraction set in torch counts, as does `cap_bytes`, a bound for the whole process:
    what is allocated already (a draft model, say) is taken off.
    """
    free, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.memory_allocated(device)
    reusable = torch.cuda.memory_reserved(device) - taken
    bound = int(total * memory_fraction(device))
    allowed = (bound if cap_bytes is None else min(bound, cap_bytes)) - taken
    return max(0, min(free + reusable, allowed))


def memory_fraction(device: torch.device) -> float:
    """The share of the device that torch lets this process have (1.0: all)."""
    getter = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if getter is None else float(getter(device))


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
