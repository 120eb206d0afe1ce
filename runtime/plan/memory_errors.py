"""A device that runs out of memory although the plan fitted: somebody else took some meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layerpack.formats.errors import CapacityError
from layerpack.formats.units import human_bytes
from layerpack.runtime.plan.plan import Plan, Tier


@contextmanager
def memory_errors(doing: str, plan: Plan) -> Iterator[None]:
    """torch's OutOfMemoryError inside the block becomes CapacityError, with the plan's figures."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"the device ran out of memory while {doing}: "
            f"{human_bytes(plan.bytes_in(Tier.VRAM))} of resident layers and {plan.num_slots} "
            f"slots of {human_bytes(plan.slot_bytes)} were to fit into "
            f"{human_bytes(plan.vram_bytes)}; end what else uses the device, or lower --vram"
        ) from error
