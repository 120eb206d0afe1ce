"""The file that remembers measurements: one JSON object in the user's cache directory.

Nothing in it is trusted, and nothing about it is an error: what cannot be read is measured again,
what cannot be written is measured again next time.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layerpack.formats.disk import write_whole
from layerpack.formats.jsontext import dump_json, parse_json

_MOST_GB_S, _MOST_THREADS = 1e6, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Direct reads of `num_threads` threads reach `gb_s` (1e9 bytes a second)."""

    gb_s: float
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """GB/s from host memory by device name; disks by the pack's directory (device:inode).

    `decoders`: GB/s out of a compressed pack's frames, by cores and pack. `products`: the way to
    multiply whose bits were found to be equal, by card, versions and shapes.
    """

    links: dict[str, float] = field(default_factory=dict)
    disks: dict[str, Disk] = field(default_factory=dict)
    decoders: dict[str, float] = field(default_factory=dict)
    products: dict[str, str] = field(default_factory=dict)


def cache_file() -> Path:
    """Where measurements are kept: $XDG_CACHE_HOME/layerpack/machine.json."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "layerpack" / "machine.json"


def load_links() -> Links:
    """What is known; empty if nothing is, or the file is not what it should be."""
    try:
        data = parse_json(cache_file().read_bytes())
    except (OSError, ValueError):
        return Links()
    links, disks, decoders, products = (
        _table(data, name) for name in ("links", "disks", "decoders", "products")
    )
    return Links(
        links={name: float(gb_s) for name, gb_s in links.items() if _is_rate(gb_s)},
        disks={
            key: Disk(gb_s=float(entry["gb_s"]), num_threads=entry["num_threads"])
            for key, entry in disks.items()
            if _is_disk(entry)
        },
        decoders={key: float(gb_s) for key, gb_s in decoders.items() if _is_rate(gb_s)},
        products={key: way for key, way in products.items() if isinstance(way, str)},
    )


def store_links(known: Links) -> None:
    """Write the file as a whole, or leave the old one."""
    file = cache_file()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, dump_json(asdict(known)))


def _table(data: Any, name: str) -> dict[str, Any]:
    table = data.get(name) if isinstance(data, dict) else None
    return table if isinstance(table, dict) else {}


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < _MOST_GB_S


def _is_disk(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _is_rate(entry.get("gb_s"))
        and type(entry.get("num_threads")) is int
        and 1 <= entry["num_threads"] <= _MOST_THREADS
    )
