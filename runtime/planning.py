"""The plan for a pack: on this machine, or on one that is not here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from layerpack.formats.errors import CapacityError
from layerpack.formats.pack import Pack
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import pass_slices
from layerpack.runtime.machine.devices import pick_device
from layerpack.runtime.machine.host_memory import host_memory
from layerpack.runtime.machine.machine import Machine
from layerpack.runtime.measure.links import probe_decoding, probe_machine
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.needs import estimate_needs
from layerpack.runtime.plan.plan import Plan
from layerpack.runtime.plan.policy import make_plan

FREE_SHARE = 0.8
"""Of the memory that a machine is said to have; its system and programs hold the rest."""


def measured(pack: Pack, device: torch.device, options: OpenOptions, patience: Patience) -> Machine:
    """This machine, measured or recalled. Raises CapacityError, StreamError."""
    return probe_machine(
        device,
        pass_slices(pack),
        vram_cap_bytes=options.limits.vram_bytes,
        refresh=options.refresh,
        patience=patience,
    )


def plan_for(machine: Machine, pack: Pack, options: OpenOptions) -> Plan:
    """Where slices live on `machine`, be it here or not. Raises CapacityError, PackError."""
    needs = estimate_needs(
        pack,
        context_tokens=options.planned_tokens,
        kv_tokens=options.planned_kv_tokens,
        proposed_tokens=options.proposed_tokens,
    )
    needs = replace(needs, constant_bytes=needs.constant_bytes + options.extra_vram_bytes)
    return make_plan(pass_slices(pack), machine=machine, needs=needs, limits=options.limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """What is stated of a machine; None is measured here. `ram_bytes` is all the memory it has.

    `vram_bytes` is what is free. Stating VRAM or a link states that there is a GPU.
    """

    vram_bytes: int | None = None
    ram_bytes: int | None = None
    link_gb_s: float | None = None
    disk_gb_s: float | None = None

    def names(self) -> list[str]:
        """What is stated, for people."""
        fields = {
            "VRAM": self.vram_bytes,
            "memory": self.ram_bytes,
            "link": self.link_gb_s,
            "disk": self.disk_gb_s,
        }
        return [name for name, value in fields.items() if value is not None]


def assumed_machine(
    pack: Pack, options: OpenOptions, assumed: Assumed, patience: Patience
) -> Machine:
    """This machine with what is assumed in place of what it has.

    What is not assumed is measured: with everything assumed, only how fast a compressed pack is
    decompressed. Raises CapacityError where a GPU is half assumed and there is none to measure the
    rest on, StreamError.
    """
    gpu_parts = (assumed.vram_bytes, assumed.link_gb_s)
    whole_gpu = None not in gpu_parts
    any_gpu = gpu_parts != (None, None)
    if any_gpu and options.device == "cpu":
        raise CapacityError("--assume-vram and --assume-link are of a GPU; leave out --device cpu")
    if whole_gpu and assumed.disk_gb_s is not None:
        free, total = host_memory()
        machine = Machine(
            device="assumed",
            vram_free_bytes=assumed.vram_bytes,
            host_free_bytes=free,
            host_total_bytes=total,
            link_gb_s=0.0,
            disk_gb_s=0.0,
            decode_gb_s=probe_decoding(pass_slices(pack), refresh=options.refresh),
        )
    else:
        device = torch.device("cpu") if whole_gpu else pick_device(options.device)
        if any_gpu and not whole_gpu and device.type == "cpu":
            raise CapacityError(
                "there is no GPU here to measure; give both --assume-vram and --assume-link"
            )
        machine = measured(pack, device, options, patience)
    return _assume(machine, assumed)


def _assume(machine: Machine, assumed: Assumed) -> Machine:
    if assumed.vram_bytes is not None:
        machine = replace(machine, device="assumed GPU", vram_free_bytes=assumed.vram_bytes)
    if assumed.ram_bytes is not None:
        machine = replace(
            machine,
            host_total_bytes=assumed.ram_bytes,
            host_free_bytes=int(assumed.ram_bytes * FREE_SHARE),
        )
    if assumed.link_gb_s is not None:
        machine = replace(machine, link_gb_s=assumed.link_gb_s)
    if assumed.disk_gb_s is not None:
        machine = replace(machine, disk_gb_s=assumed.disk_gb_s)
    return machine
