"""The plan for a pack on a machine: measured facts and options in, the planner's decision out."""

from __future__ import annotations

from dataclasses import replace

import torch

from layerpack.formats.pack import Pack
from layerpack.runtime.core.slices import pass_slices
from layerpack.runtime.machine.machine import Machine
from layerpack.runtime.measure import links as measure
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.needs import estimate_needs
from layerpack.runtime.plan.plan import Plan, plan, plan_cpu


def make_plan(pack: Pack, device: torch.device, options: OpenOptions) -> tuple[Machine, Plan]:
    """Measure the machine (or recall it), decide where slices live.

    Raises CapacityError, StreamError.
    """
    machine = measure.probe_machine(
        device,
        pass_slices(pack),
        vram_cap_bytes=options.limits.vram_bytes,
        refresh=options.refresh,
        watchdog_s=options.watchdog_s,
    )
    return machine, plan_on(machine, pack, options)


def plan_on(machine: Machine, pack: Pack, options: OpenOptions) -> Plan:
    """Where slices live on `machine`, be it here or not. Raises CapacityError, PackError."""
    slices = pass_slices(pack)
    needs = estimate_needs(
        pack, context_tokens=options.context_tokens, proposed_tokens=options.proposed_tokens
    )
    needs = replace(needs, constant_bytes=needs.constant_bytes + options.extra_vram_bytes)
    decide = plan_cpu if machine.vram_free_bytes is None else plan
    return decide(slices, machine=machine, needs=needs, limits=options.limits)
