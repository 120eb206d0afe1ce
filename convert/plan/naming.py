"""Which tensor of the checkpoint is which parameter of the model."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from layerpack.convert.plan.structure import Structure
from layerpack.formats.errors import SourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """`found`: parameter name -> checkpoint name, for every parameter of the model.

    `others` and `skipped` are the checkpoint's names of what is left out: as no part of the text
    model, and because the user said so.
    """

    found: dict[str, str]
    others: tuple[str, ...]
    skipped: tuple[str, ...]


def match_names(
    structure: Structure, names: Iterable[str], *, skip: Sequence[str] = (), where: str
) -> Names:
    """Which tensor is which. `skip` are patterns, as in a shell, of tensors that may be left out.

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
    others = [n for n in homeless if structure.canonical_name(n) in structure.others]
    left = [n for n in homeless if n not in others and not _may_be_ignored(n, structure)]
    skipped = [n for n in left if any(fnmatch.fnmatchcase(n, pattern) for pattern in skip)]
    if unknown := [name for name in left if name not in skipped]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise SourceError(
            f"{where}: {structure.architecture} has no place for the tensor {unknown[0]}{more}; "
            "if the model's text does not need what config.json does not know of, leave it out "
            f"with --skip '{_pattern(unknown[0])}'"
        )
    return Names(found=found, others=tuple(others), skipped=tuple(skipped))


def _pattern(name: str) -> str:
    """Of a tensor in a layer, the same in all of them."""
    return re.sub(r"\.\d+\.", ".*.", name)


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
