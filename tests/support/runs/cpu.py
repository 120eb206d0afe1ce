"""A pack opened on the CPU from disk or mapped, for one pass, or its layers loaded alone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch

from layerpack.formats.read import BufferedReader
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits
from layerpack.runtime.stream.host_tier import HostTier

IDS = torch.tensor([[7, 201, 33, 90, 5]])
FROM_DISK = OpenOptions(device="cpu", limits=Limits(host_slices=0), direct=False, watchdog_s=0.4)
MAPPED = OpenOptions(device="cpu", watchdog_s=0.4)


def logits_of(pack: Path, options: OpenOptions) -> torch.Tensor:
    """The logits of IDS, after one pass of a model that is opened for it."""
    with Model.open(pack, options) as opened, torch.no_grad():
        found: torch.Tensor = opened.network(IDS).logits
    return found


def load_host(slices: tuple[Slice, ...], *, may_register: bool = False) -> None:
    """Take the slices into host memory and give them back."""
    with closing(BufferedReader()) as reader, HostTier(torch.device("cpu")) as store:
        store.load(slices, reader, may_register=may_register, patience=Patience(0.4))
