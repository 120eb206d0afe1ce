"""Which tensor of the checkpoint is which parameter of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from layerpack.convert.plan.structure import Structure
from layerpack.formats.errors import SourceError


def match_names(structure: Structure, names: Iterable[str], *, where: str) -> dict[str, str]:
    """Parameter name -> checkpoint name, for every parameter of the model.

    A checkpoint may use a model's older names, or lack the base model's prefix (`model.`).
    A stored copy of a tied lm_head is left out; any other tensor that the model has no place for is
    refused by name, as is a parameter that is missing.
    """
    wanted = {parameter.name for parameter in structure.parameters}
    found: dict[str, str] = {}
    homeless: list[str] = []
    for stored in sorted(names):
        name = structure.canonical_name(stored)
        if name not in wanted:
            name = structure.base_prefix + name
        if name not in wanted:
            homeless.append(stored)
        elif found.setdefault(name, stored) != stored:
            raise SourceError(f"{where}: tensors {found[name]} and {stored} are the same weight")
    for parameter in structure.parameters:
        if parameter.name not in found:
            raise SourceError(
                f"{where}: {structure.architecture} needs the tensor {parameter.name}, which is "
                "not there; if the checkpoint is one of the base model alone, use the full one"
            )
    for stored in homeless:
        if not _may_be_ignored(stored, structure):
            raise SourceError(
                f"{where}: {structure.architecture} has no place for the tensor {stored}; "
                "config.json and weights do not belong together"
            )
    return found


def tied_copy(structure: Structure, names: Iterable[str]) -> str | None:
    """The checkpoint's name of lm_head's weight where that is the embedding and stored as well."""
    if not structure.tied:
        return None
    return next(
        (name for name in names if structure.canonical_name(name) == structure.output), None
    )


def _may_be_ignored(name: str, structure: Structure) -> bool:
    if tied_copy(structure, [name]):
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
