"""A pack opened on a CUDA device with its layers in any tier, for one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits

IDS = torch.tensor([[7, 201, 33, 90, 5]])
TIERS = {
    "VRAM": Limits(),
    "host": Limits(vram_slices=0),
    "disk": Limits(vram_slices=0, host_slices=0),
    "mixed": Limits(vram_slices=1, host_slices=1),
}
tiers = pytest.mark.parametrize("tier", TIERS)


def options(tier: str, **fields: Any) -> OpenOptions:
    """Options that put the layers where TIERS says, with more fields of OpenOptions."""
    return OpenOptions(
        device="cuda", limits=TIERS[tier], context_tokens=64, watchdog_s=5.0, **fields
    )


def logits_of(pack: Path, how: OpenOptions) -> torch.Tensor:
    """The logits of IDS on the host, after one pass of a model that is opened for it."""
    with Model.open(pack, how) as opened, torch.no_grad():
        found: torch.Tensor = opened.network(IDS.cuda()).logits.cpu()
    return found
