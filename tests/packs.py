"""Comparing packs, byte for byte."""

from __future__ import annotations

from pathlib import Path


def differing(path: Path, other: Path) -> list[str]:
    """Names of the files that are not the same in both directories."""
    names = {file.name for file in path.iterdir()} | {file.name for file in other.iterdir()}
    return [
        name
        for name in sorted(names)
        if not (path / name).is_file()
        or not (other / name).is_file()
        or (path / name).read_bytes() != (other / name).read_bytes()
    ]
