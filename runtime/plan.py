"""Where every slice lives, decided from facts alone: no file, thread or device is touched here.

A fixed set of slices stays in VRAM, another in host memory; the rest is read from disk on every
pass. The set is fixed because the scan is cyclic, for which a least-recently-used cache is the
worst there is. Each tier is spread evenly over the pass, so that neither link nor disk idles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from layerpack.formats.errors import CapacityError
from layerpack.formats.units import MIB, human_bytes
from layerpack.runtime.compression import CompressionEffect, compression_effect
from layerpack.runtime.machine import Machine
from layerpack.runtime.slices import Slice

PIECE_BYTES = 16 * MIB
RING_BYTES = 512 * MIB
_OWN_MEMORY_MARGIN = 0.1
_MARGIN = 0.04  # of VRAM: the allocator's rounding and what kernels ask for on the side


class Tier(Enum):
    """Where a slice's bytes are between passes."""

    VRAM = "vram"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """VRAM that a run takes beside weights, in bytes.

    `cache_bytes`: KV cache of the whole context. `activation_bytes`: the largest set of
    intermediates of one pass. `decode_bytes`: the largest weight, decoded to 16 bits.
    `constant_bytes`: norms and other small tensors that stay, a resident draft model included.
    """

    cache_bytes: int = 0
    activation_bytes: int = 0
    decode_bytes: int = 0
    constant_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of them at once."""
        return self.cache_bytes + self.activation_bytes + self.decode_bytes + self.constant_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the user allows. None: as much as the machine has.

    `vram_bytes` bounds all of the process's VRAM; `ram_bytes` the weights kept in host memory;
    `vram_slices` and `host_slices` override the number of slices in a tier.
    """

    vram_bytes: int | None = None
    ram_bytes: int | None = None
    num_slots: int = 3
    vram_slices: int | None = None
    host_slices: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`tiers[i]` is where slice i lives. Times are predictions for one pass, in seconds.

    `streamed_bytes` pass through the device's slots in each pass; `num_pieces` buffers of
    `piece_bytes` are between the disk and the slots. `compression` is set for a compressed pack.
    """

    slices: tuple[Slice, ...]
    tiers: tuple[Tier, ...]
    num_slots: int
    slot_bytes: int
    piece_bytes: int
    num_pieces: int
    needs: Needs
    vram_bytes: int
    streamed_bytes: int
    link_s: float
    disk_s: float
    compression: CompressionEffect | None = None

    @property
    def decode_s(self) -> float:
        """Time to decompress what comes from disk."""
        return 0.0 if self.compression is None else self.compression.decode_s

    @property
    def pass_s(self) -> float:
        """The time of what is slowest: link, disk or decompressing."""
        return max(self.link_s, self.disk_s, self.decode_s)

    def bytes_in(self, tier: Tier) -> int:
        """Weights that live in `tier`."""
        return sum(
            part.length_bytes
            for part, where in zip(self.slices, self.tiers, strict=True)
            if where is tier
        )

    def slices_in(self, tier: Tier) -> tuple[Slice, ...]:
        """The slices of one tier, in pass order."""
        return tuple(
            part for part, where in zip(self.slices, self.tiers, strict=True) if where is tier
        )


def plan_cpu(slices: Sequence[Slice], *, machine: Machine, limits: Limits = Limits()) -> Plan:
    """On a CPU mapped files are used in place; what exceeds the memory comes through two slots.

    Raises CapacityError if an override does not fit.
    """
    slices = tuple(slices)
    slot_bytes = max(part.slot_bytes for part in slices)
    budget = _host_budget(slices, machine) - 2 * slot_bytes
    if limits.ram_bytes is not None:
        budget = min(budget, limits.ram_bytes)
    in_host = _fill(slices, budget, limits.host_slices, "host memory")
    tiers = tuple(Tier.HOST if part.index in in_host else Tier.DISK for part in slices)
    return _plan(slices, tiers, min(2, limits.num_slots), machine, Needs(), 0)


def plan(
    slices: Sequence[Slice], *, machine: Machine, needs: Needs, limits: Limits = Limits()
) -> Plan:
    """Fill VRAM, then host memory, then leave the rest on disk.

    Raises CapacityError, with the figures, if not even the slots fit, or an override does not.
    """
    slices = tuple(slices)
    slot_bytes = max(part.slot_bytes for part in slices)
    available = machine.vram_free_bytes or 0
    if limits.vram_bytes is not None:
        available = min(available, limits.vram_bytes)
    fixed = needs.total_bytes + int(available * _MARGIN)
    num_slots = _fitting_slots(available - fixed, slot_bytes, limits.num_slots, needs, available)
    in_vram = _fill(slices, available - fixed - num_slots * slot_bytes, limits.vram_slices, "VRAM")
    rest = [part for part in slices if part.index not in in_vram]
    host_budget = _host_budget(slices, machine)
    if limits.ram_bytes is not None:
        host_budget = min(host_budget, limits.ram_bytes)
    in_host = _fill(rest, host_budget, limits.host_slices, "host memory")
    tiers = tuple(
        Tier.VRAM if part.index in in_vram else Tier.HOST if part.index in in_host else Tier.DISK
        for part in slices
    )
    return _plan(slices, tiers, num_slots, machine, needs, available)


def _host_budget(slices: tuple[Slice, ...], machine: Machine) -> int:
    """Bytes for the host tier. A compressed pack's is memory of its own, not the page cache, which
    would give way to others: some is left for them."""
    budget = machine.host_free_bytes - RING_BYTES
    return budget if slices[0].frames is None else int(budget * (1 - _OWN_MEMORY_MARGIN))


def _plan(
    slices: tuple[Slice, ...],
    tiers: tuple[Tier, ...],
    num_slots: int,
    machine: Machine,
    needs: Needs,
    vram_bytes: int,
) -> Plan:
    on_gpu = machine.vram_free_bytes is not None
    lengths = [(part.length_bytes, where) for part, where in zip(slices, tiers, strict=True)]
    disk_bytes = sum(length for length, where in lengths if where is Tier.DISK)
    host_bytes = sum(length for length, where in lengths if where is Tier.HOST)
    moved_bytes = disk_bytes + (host_bytes if on_gpu else 0)
    link_s = moved_bytes / (machine.link_gb_s * 1e9) if machine.link_gb_s else 0.0
    on_disk = [part for part, where in zip(slices, tiers, strict=True) if where is Tier.DISK]
    compression = compression_effect(on_disk, machine, link_s) if slices[0].frames else None
    plain_disk_s = disk_bytes / (machine.disk_gb_s * 1e9) if machine.disk_gb_s else 0.0
    slot_bytes = max(part.slot_bytes for part in slices)
    piece_bytes = min(PIECE_BYTES, slot_bytes)
    return Plan(
        slices=slices,
        tiers=tiers,
        num_slots=num_slots if moved_bytes else 0,
        slot_bytes=slot_bytes if moved_bytes else 0,
        piece_bytes=piece_bytes,
        num_pieces=max(2, RING_BYTES // piece_bytes) if disk_bytes else 0,
        needs=needs,
        vram_bytes=vram_bytes,
        streamed_bytes=moved_bytes,
        link_s=link_s,
        disk_s=plain_disk_s if compression is None else compression.disk_s,
        compression=compression,
    )


def _fitting_slots(
    free_bytes: int, slot_bytes: int, wanted: int, needs: Needs, available: int
) -> int:
    """`wanted` slots, or two if no more fit: one to compute from while the other fills."""
    for count in (wanted, 2):
        if count * slot_bytes <= free_bytes:
            return count
    missing = 2 * slot_bytes - free_bytes
    raise CapacityError(
        f"{human_bytes(available)} of VRAM are {human_bytes(missing)} too few: two layer slots "
        f"take {human_bytes(2 * slot_bytes)}, KV cache {human_bytes(needs.cache_bytes)}, "
        f"activations {human_bytes(needs.activation_bytes)}, decoding "
        f"{human_bytes(needs.decode_bytes)}, constants {human_bytes(needs.constant_bytes)}; "
        "lower --context or raise --vram"
    )


def _fill(
    slices: Sequence[Slice], budget_bytes: int, override: int | None, where: str
) -> frozenset[int]:
    """Indices of as many slices as fit, evenly spread over `slices`."""
    largest = max((part.slot_bytes for part in slices), default=1)
    total = sum(part.slot_bytes for part in slices)
    if override is None:
        count = len(slices) if total <= budget_bytes else max(0, budget_bytes // largest)
        # Slices differ in size (lm_head's last rows): more of them may fit than of the largest.
        while count < len(slices) and _bytes_of(slices, count + 1) <= budget_bytes:
            count += 1
    else:
        count = min(override, len(slices))
        if _bytes_of(slices, count) > budget_bytes:
            raise CapacityError(
                f"{count} layers of {human_bytes(largest)} do not fit into "
                f"{human_bytes(max(0, budget_bytes))} of {where}; ask for fewer"
            )
    return frozenset(slices[place].index for place in spread(count, len(slices)))


def _bytes_of(slices: Sequence[Slice], count: int) -> int:
    return sum(slices[place].slot_bytes for place in spread(count, len(slices)))


def spread(count: int, total: int) -> list[int]:
    """`count` places out of `total`, as evenly as whole numbers allow."""
    return [(2 * step + 1) * total // (2 * count) for step in range(count)]
