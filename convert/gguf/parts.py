"""GGUF files that are parts of one model: MODEL-00001-of-00003.gguf and so on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from layerpack.formats.errors import SourceError

_PART = re.compile(r"(.+-)(\d{5})-of-(\d{5})\.gguf")


def first_parts(names: Iterable[str]) -> list[str]:
    """Of each model the only file, or the first of its parts (whose others may be missing)."""
    firsts: dict[str | tuple[str, str], str] = {}
    for name in sorted(names):
        match = _PART.fullmatch(name)
        firsts.setdefault(name if match is None else (match[1], match[3]), name)
    return list(firsts.values())


def part_names(name: str) -> list[str]:
    """The names of all files of the model that `name` is one of, in order."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    start, _, count = match.groups()
    return [f"{start}{number:05}-of-{count}.gguf" for number in range(1, int(count) + 1)]


def all_parts(path: Path) -> list[Path]:
    """The files of the model that `path` is one of, in order. Raises SourceError."""
    paths = [path.with_name(name) for name in part_names(path.name)]
    for part in paths:
        if len(paths) > 1 and not part.is_file():
            raise SourceError(f"{part}: missing, a part of the same model as {path.name}")
    return paths
