"""Which tensor of the checkpoint is which parameter of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from layerpack.convert.structure import Structure
from layerpack.formats import nf4
from layerpack.formats.errors import SourceError

FP8_SCALE = "_scale_inv"
_CONSTANTS = (*nf4.SUFFIXES, FP8_SCALE)


def match_names(structure: Structure, names: Iterable[str], *, where: str) -> dict[str, str]:
    """Parameter name -> checkpoint name, for every parameter of the model.

    A checkpoint of the base model alone lacks the base prefix (`model.`); that is allowed where it
    holds for all of it. Constants of quantised weights go with their weight and a stored copy of a
    tied lm_head is left out; any other tensor that the model has no place for is refused by name,
    as is a parameter that is missing.
    """
    present = {name for name in names if not name.endswith(_CONSTANTS)}
    wanted = [parameter.name for parameter in structure.parameters]
    found = {name: name for name in wanted}
    if not any(name.startswith(structure.base_prefix) for name in present):
        found = {name: name.removeprefix(structure.base_prefix) for name in wanted}
    for stored in found.values():
        if stored not in present:
            raise SourceError(
                f"{where}: {structure.architecture} needs the tensor {stored}, which is not in "
                "the checkpoint; if it is one of the base model alone, use the full one"
            )
    for name in sorted(present - set(found.values())):
        if not _may_be_ignored(name, structure):
            raise SourceError(
                f"{where}: {structure.architecture} has no place for the tensor {name}; "
                "config.json and weights do not belong together"
            )
    return found


def _may_be_ignored(name: str, structure: Structure) -> bool:
    if structure.tied and name == structure.output:
        return True
    return any(re.search(pattern, name) for pattern in structure.ignored)


def check_shapes(
    structure: Structure,
    found: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """Compare the shapes of the tensors in `shapes` (by checkpoint name) with the model's."""
    for parameter in structure.parameters:
        shape = shapes.get(found[parameter.name], parameter.shape)
        if shape != parameter.shape:
            raise SourceError(
                f"{where}: {found[parameter.name]} has the shape {list(shape)} where config.json "
                f"says {list(parameter.shape)}"
            )
