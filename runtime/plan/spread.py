"""Choosing slices for a tier: as many bytes as fit, evenly spread over the pass."""

from __future__ import annotations

from collections.abc import Sequence

from layerpack.formats.errors import CapacityError
from layerpack.formats.units import human_bytes
from layerpack.runtime.core.slices import Slice


def fill(
    slices: Sequence[Slice], budget_bytes: int, override: int | None, where: str
) -> frozenset[int]:
    """Indices of the evenly spread slices that use most of the budget, or of as many as asked.

    Raises CapacityError if an `override` (a number of slices) does not fit into `where`.
    """
    budget_bytes = max(0, budget_bytes)
    if override is None:
        sizes = [_bytes_of(slices, count) for count in range(len(slices) + 1)]
        fitting = [count for count, size in enumerate(sizes) if size <= budget_bytes]
        # Slices differ in size (lm_head's last rows), so more of them are not always more bytes.
        count = max(fitting, key=lambda count: sizes[count])
    else:
        count = min(override, len(slices))
        wanted = _bytes_of(slices, count)
        if wanted > budget_bytes:
            raise CapacityError(
                f"{count} layers take {human_bytes(wanted)}, but {human_bytes(budget_bytes)} of "
                f"{where} are left for them; ask for fewer"
            )
    return frozenset(slices[place].index for place in spread(count, len(slices)))


def total_bytes(slices: Sequence[Slice]) -> int:
    """Room for all of them."""
    return sum(part.slot_bytes for part in slices)


def _bytes_of(slices: Sequence[Slice], count: int) -> int:
    return sum(slices[place].slot_bytes for place in spread(count, len(slices)))


def spread(count: int, total: int) -> list[int]:
    """`count` places out of `total`, as evenly as whole numbers allow."""
    return [(2 * step + 1) * total // (2 * count) for step in range(count)]
