"""What this machine has: memory that may be used, by the system's and the cgroup's word.

How fast it is, `measure.py` finds out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from layerpack.formats.errors import CapacityError

_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts for the planner. Bandwidths in GB/s (1e9 bytes); 0 where there is no such link.

    `vram_free_bytes` is what this process may still allocate; None on a CPU. `decode_gb_s` counts
    the bytes that come out when all reader threads decompress; 0 where the pack is plain.
    """

    device: str
    vram_free_bytes: int | None
    host_free_bytes: int
    link_gb_s: float
    disk_gb_s: float
    decode_gb_s: float = 0.0


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
    bound = int(total * _memory_fraction(device))
    allowed = (bound if cap_bytes is None else min(bound, cap_bytes)) - taken
    return max(0, min(free + reusable, allowed))


def _memory_fraction(device: torch.device) -> float:
    getter = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if getter is None else float(getter(device))


def host_free_bytes() -> int:
    """Host memory that can be taken without swapping: the least of system and cgroup limits."""
    available = _meminfo("MemAvailable")
    if available is None:
        pages = os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0
        available = pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else _UNLIMITED
    return min(available, _cgroup_free_bytes())


def _meminfo(field: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == field:
                return int(rest.split()[0]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Limit less use (page cache not counted, as it gives way); huge where there is no limit."""
    for limit_name, usage_name, stat_name in (
        ("memory.max", "memory.current", "memory.stat"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
        ),
    ):
        try:
            text = (root / limit_name).read_text().strip()
            if text == "max" or int(text) > _UNLIMITED:
                continue
            usage = int((root / usage_name).read_text())
            stat = dict(line.split() for line in (root / stat_name).read_text().splitlines())
        except (OSError, ValueError):
            continue
        cache = int(stat.get("file", stat.get("total_cache", 0)))
        return max(0, int(text) - max(0, usage - cache))
    return _UNLIMITED
