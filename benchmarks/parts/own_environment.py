"""A folder of links to layerpack and what it depends on, and nothing else that is installed.

transformers imports whatever it finds beside it, scikit-learn and torchvision among them, and that
takes seconds. `PYTHONPATH=FOLDER python -S` starts as it would where only layerpack was installed.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OWN = "layerpack"
_PARTS = ("cli", "convert", "formats", "libraries", "runtime")


def link_own(folder: Path) -> list[str]:
    """Fill `folder`, which exists; the names of the distributions that are in it."""
    found = _with_dependencies(OWN)
    for name, one in found.items():
        if name != OWN:
            _link_files(one, folder)
    (folder / OWN).mkdir()
    for part in _PARTS:
        spec = importlib.util.find_spec(f"{OWN}.{part}")
        assert spec is not None and spec.submodule_search_locations
        (folder / OWN / part).symlink_to(Path(next(iter(spec.submodule_search_locations))))
    _link_files(found[OWN], folder)  # its version is asked for
    return sorted(found)


def _with_dependencies(name: str) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(name, frozenset({""}))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # an environment may lack what it can do without
        for text in found[name].requires or []:
            wanted = Requirement(text)
            if wanted.marker is None or any(
                wanted.marker.evaluate({"extra": extra}) for extra in extras
            ):
                waiting.append((canonicalize_name(wanted.name), frozenset({"", *wanted.extras})))
    return found


def _link_files(one: Distribution, folder: Path) -> None:
    for first in {file.parts[0] for file in one.files or [] if file.parts[0] not in _IGNORED}:
        place = Path(str(one.locate_file(first))).resolve()
        link = folder / first
        if place.exists() and not link.exists():
            link.symlink_to(place)


_IGNORED = ("..", "__pycache__", "bin")
