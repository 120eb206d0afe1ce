"""How many sequences at a time, and how much KV cache for them: what memory allows."""

from __future__ import annotations

from dataclasses import replace

import torch

from layerpack.formats.errors import CapacityError
from layerpack.formats.pack import Pack
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.machine.devices import pick_device
from layerpack.runtime.machine.machine import Machine
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.needs import context_limit
from layerpack.runtime.plan.plan import Limits, Plan
from layerpack.runtime.planning import measured, plan_for

MOST_SEQUENCES = 256


def context_and_kv(
    pack: Pack,
    *,
    context: int,
    sequences: int,
    device: str = "auto",
    limits: Limits = Limits(),
    exactly: bool = False,
) -> tuple[int, int]:
    """(tokens of the longest sequence, KV tokens of all together) for `sequences` at a time.

    Unless that many are to be `exactly`, as many fewer as the memory here has room for. Raises
    CapacityError if there is room for none, or not for exactly so many.
    """
    context = min(context, context_limit(pack) or context)
    options = OpenOptions(device=device, limits=limits, context_tokens=context)
    where: torch.device = pick_device(device)
    machine = measured(pack, where, options, Patience())
    least = 1 if not exactly else sequences
    return context, context * most_sequences(
        pack, machine, options, least=least, most=min(sequences, MOST_SEQUENCES)
    )


def most_sequences(
    pack: Pack, machine: Machine, options: OpenOptions, *, least: int, most: int
) -> int:
    """The most sequences, from `least` to `most`, with which a plan is possible.

    More of them take VRAM from resident layers: a pass of more sequences is worth more than a
    pass that is faster by their share. Raises CapacityError.
    """
    plan_of(pack, machine, options, least)
    low, high = least, max(least, most)
    while low < high:
        middle = (low + high + 1) // 2
        try:
            plan_of(pack, machine, options, middle)
            low = middle
        except CapacityError:
            high = middle - 1
    return low


def plan_of(pack: Pack, machine: Machine, options: OpenOptions, sequences: int) -> Plan:
    """The plan with so many sequences of the whole context. Raises CapacityError."""
    kv_tokens = options.planned_tokens * sequences
    return plan_for(machine, pack, replace(options, kv_tokens=kv_tokens))
