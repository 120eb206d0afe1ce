"""What this machine has: memory that may be used, by the system's and the cgroup's word.

How fast it is, `measure.py` finds out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from layerpack.formats.errors import CapacityError

READ_THREADS = 8
"""Threads that read the disk where no number was found to be better."""
DECODE_THREADS = 16
"""The fewest threads that read a compressed pack: most of their time they decompress."""
_UNLIMITED = 1 << 60
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts for the planner. Bandwidths in GB/s (1e9 bytes); 0 where there is no such link.

    `vram_free_bytes` is what this process may still allocate; None on a CPU. `host_total_bytes` is
    all the memory of the machine or cgroup (0: not known). `disk_gb_s` is what `disk_threads`
    threads read. `decode_gb_s` counts the bytes that come out when DECODE_THREADS threads
    decompress; 0 where the pack is plain.
    """

    device: str
    vram_free_bytes: int | None
    host_free_bytes: int
    host_total_bytes: int = 0
    link_gb_s: float
    disk_gb_s: float
    disk_threads: int = READ_THREADS
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
    bound = int(total * memory_fraction(device))
    allowed = (bound if cap_bytes is None else min(bound, cap_bytes)) - taken
    return max(0, min(free + reusable, allowed))


def memory_fraction(device: torch.device) -> float:
    """The share of the device that torch lets this process have (1.0: all)."""
    getter = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if getter is None else float(getter(device))


def host_memory() -> tuple[int, int]:
    """(free, total) bytes of host memory: the least of what system and cgroups say.

    Free is what can be taken without swapping; page cache counts as free, as it gives way.
    """
    free, total = _meminfo("MemAvailable"), _meminfo("MemTotal")
    if free is None or total is None:
        free, total = _sysconf_bytes("SC_AVPHYS_PAGES"), _sysconf_bytes("SC_PHYS_PAGES")
    limits = [(free, total), *cgroup_memory(_own_cgroups())]
    return min(free for free, _ in limits), min(total for _, total in limits)


def _sysconf_bytes(name: str) -> int:
    try:
        pages = os.sysconf(name)
    except (AttributeError, ValueError, OSError):
        return _UNLIMITED
    return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else _UNLIMITED


def _meminfo(field: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == field:
                return int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _own_cgroups() -> str:
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:
        return ""


def cgroup_memory(own: str, root: Path = _CGROUPS) -> list[tuple[int, int]]:
    """(free, limit) of each cgroup with a limit, from this process's up to the root's.

    `own` is the text of /proc/self/cgroup: `0::/path` (version 2), `4:memory:/path` (version 1).
    """
    found = []
    for line in own.splitlines() or ["0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            top, names = root, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top, names = (
                root / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
            )
        else:
            continue
        # In a container the path may be the host's, and not be here: the root is then our own.
        place = top / path.strip("/")
        for folder in (place, *place.parents):
            if limit := _cgroup_limit(folder, *names):
                found.append(limit)
            if folder == top:
                break
    return found


def _cgroup_limit(
    folder: Path, limit_name: str, usage_name: str, prefix: str
) -> tuple[int, int] | None:
    """(free, limit): the limit less use, page cache not counted; None where there is no limit."""
    try:
        text = (folder / limit_name).read_text().strip()
        if text == "max" or int(text) > _UNLIMITED:
            return None
        usage = int((folder / usage_name).read_text())
        pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    except (OSError, ValueError):
        return None
    # Not the sum `file` or `cache`: those count tmpfs, which does not give way.
    cache = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return max(0, int(text) - max(0, usage - cache)), int(text)
