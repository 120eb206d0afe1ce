"""Host memory that may be used, by the system's and the cgroup's word."""

from __future__ import annotations

import os
from pathlib import Path

_UNLIMITED = 1 << 60
_CGROUPS = Path("/sys/fs/cgroup")


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
