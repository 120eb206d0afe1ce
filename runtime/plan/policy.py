"""Where every slice is to live, decided from facts alone: no file, thread or device is touched.

A fixed set of slices stays in VRAM, another in host memory; the rest is read from disk on every
pass. The set is fixed because the scan is cyclic, for which a least-recently-used cache is the
worst there is. Each tier is spread evenly over the pass, so that neither link nor disk idles.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerpack.formats.errors import CapacityError
from layerpack.formats.units import GIB, human_bytes
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.machine.machine import DECODE_THREADS, Machine
from layerpack.runtime.plan.compression import compression_effect
from layerpack.runtime.plan.plan import BUFFER_BYTES, NUM_BUFFERS, Limits, Needs, Plan, Tier
from layerpack.runtime.plan.spread import fill, total_bytes

_MARGIN = 0.04  # of VRAM: the allocator's rounding and what kernels ask for on the side

# Host memory that is free now and yet not ours to fill. Registered pages can be neither dropped nor
# swapped, and what the system calls available includes the page cache of running programs, which
# fault it in again at once: to pin all of it makes a desktop crawl, and the next program that wants
# memory wakes the out-of-memory killer. So leave what this process itself still grows by (CUDA's
# libraries, transformers, bitsandbytes, the tokenizer), and for everybody else a tenth of the
# memory, up to 4 GiB: what others need does not grow with a server's terabytes.
_OWN_GROWTH_BYTES = 3 * GIB // 2
_OTHERS_SHARE, _OTHERS_MOST_BYTES = 0.1, 4 * GIB


def make_plan(
    slices: Sequence[Slice],
    *,
    machine: Machine,
    needs: Needs = Needs(),
    limits: Limits = Limits(),
) -> Plan:
    """The plan for a machine with a GPU, or for one without.

    Raises CapacityError, with the figures, if what a run needs beside weights does not fit, or an
    override does not.
    """
    decide = _on_cpu if machine.vram_free_bytes is None else _on_gpu
    return decide(tuple(slices), machine, needs, limits)


def _on_cpu(slices: tuple[Slice, ...], machine: Machine, needs: Needs, limits: Limits) -> Plan:
    """Mapped files are used in place; what exceeds the memory comes through two slots.

    A bound for VRAM holds, as none is used.
    """
    if limits.vram_slices:
        raise CapacityError(
            f"{limits.vram_slices} layers are to be kept in VRAM, which a CPU does not have; "
            "leave out --vram-layers, or run on a GPU"
        )
    slot_bytes = max(part.slot_bytes for part in slices)
    num_slots = min(2, limits.num_slots)
    budget = _host_budget(machine, limits, needs.total_bytes)
    if limits.host_slices is not None or total_bytes(slices) > budget:
        on_the_way = num_slots * slot_bytes + _ring_bytes(slot_bytes)
        if machine.host_free_bytes < needs.total_bytes + on_the_way:
            raise _too_little(machine.host_free_bytes, "host memory", needs, on_the_way, limits)
        budget -= on_the_way
    in_host = fill(slices, budget, limits.host_slices, "host memory")
    tiers = tuple(Tier.HOST if part.index in in_host else Tier.DISK for part in slices)
    return _plan(slices, tiers, num_slots, machine, needs, host_budget_bytes=budget)


def _on_gpu(slices: tuple[Slice, ...], machine: Machine, needs: Needs, limits: Limits) -> Plan:
    """Fill VRAM, then host memory, then leave the rest on disk."""
    slot_bytes = max(part.slot_bytes for part in slices)
    available = machine.vram_free_bytes or 0
    if limits.vram_bytes is not None:
        available = min(available, limits.vram_bytes)
    margin = int(available * _MARGIN)
    free = available - needs.total_bytes - margin
    num_slots, in_vram = _fill_vram(slices, free, limits, needs, available)
    rest = [part for part in slices if part.index not in in_vram]
    host_budget = _host_budget(machine, limits, 0)
    if limits.host_slices is not None or total_bytes(rest) > host_budget:
        host_budget -= _ring_bytes(slot_bytes)
    in_host = fill(rest, host_budget, limits.host_slices, "host memory")
    tiers = tuple(
        Tier.VRAM if part.index in in_vram else Tier.HOST if part.index in in_host else Tier.DISK
        for part in slices
    )
    return _plan(
        slices,
        tiers,
        num_slots,
        machine,
        needs,
        vram_bytes=available,
        margin_bytes=margin,
        host_budget_bytes=host_budget,
    )


def _plan(
    slices: tuple[Slice, ...],
    tiers: tuple[Tier, ...],
    num_slots: int,
    machine: Machine,
    needs: Needs,
    *,
    vram_bytes: int = 0,
    margin_bytes: int = 0,
    host_budget_bytes: int,
) -> Plan:
    on_gpu = machine.vram_free_bytes is not None
    on_disk = [part for part, where in zip(slices, tiers, strict=True) if where is Tier.DISK]
    in_host = [part for part, where in zip(slices, tiers, strict=True) if where is Tier.HOST]
    stored_bytes = sum(part.stored.length_bytes for part in on_disk)
    moved_bytes = sum(part.length_bytes for part in ([*on_disk, *in_host] if on_gpu else on_disk))
    link_s = moved_bytes / (machine.link_gb_s * 1e9) if machine.link_gb_s else 0.0
    slot_bytes = max(part.slot_bytes for part in slices)
    return Plan(
        slices=slices,
        tiers=tiers,
        num_slots=num_slots if moved_bytes else 0,
        slot_bytes=slot_bytes if moved_bytes else 0,
        buffer_bytes=min(BUFFER_BYTES, slot_bytes),
        num_buffers=NUM_BUFFERS if on_disk else 0,
        read_threads=min(_read_threads(slices, machine), NUM_BUFFERS) if on_disk else 0,
        needs=needs,
        vram_bytes=vram_bytes,
        margin_bytes=margin_bytes,
        host_budget_bytes=max(0, host_budget_bytes),
        streamed_bytes=moved_bytes,
        disk_bytes=stored_bytes,
        link_s=link_s,
        disk_s=stored_bytes / (machine.disk_gb_s * 1e9) if machine.disk_gb_s else 0.0,
        compression=compression_effect(on_disk, machine, link_s) if slices[0].frames else None,
    )


def _read_threads(slices: Sequence[Slice], machine: Machine) -> int:
    """Those that read fastest; readers of a compressed pack decompress as well: some more."""
    if slices[0].frames is None:
        return machine.disk_threads
    return max(machine.disk_threads, DECODE_THREADS)


def _host_budget(machine: Machine, limits: Limits, taken_bytes: int) -> int:
    """What weights may take of host memory, if no ring is needed; may be less than nothing."""
    free = machine.host_free_bytes - taken_bytes
    if limits.ram_bytes is not None:
        return min(limits.ram_bytes, free)
    if limits.host_slices is not None:
        return free
    others = min(int(machine.host_total_bytes * _OTHERS_SHARE), _OTHERS_MOST_BYTES)
    return free - _OWN_GROWTH_BYTES - others


def _fill_vram(
    slices: Sequence[Slice], free_bytes: int, limits: Limits, needs: Needs, available: int
) -> tuple[int, frozenset[int]]:
    """(slots, indices of resident slices): slots first, but none if every slice is resident."""
    if limits.vram_slices is None and total_bytes(slices) <= free_bytes:
        return 0, frozenset(part.index for part in slices)
    slot_bytes = max(part.slot_bytes for part in slices)
    wanted, least = limits.num_slots, min(2, limits.num_slots)
    if limits.vram_slices is None:
        num_slots = min(wanted, free_bytes // slot_bytes)
        if num_slots < least:
            raise _too_little(available, "VRAM", needs, least * slot_bytes, limits)
        # While slots are still missing nothing stays for good: the first use of VRAM is overlap.
        budget = free_bytes - num_slots * slot_bytes if num_slots == wanted else 0
        return num_slots, fill(slices, budget, None, "VRAM")
    if limits.vram_slices >= len(slices):
        return 0, fill(slices, free_bytes, limits.vram_slices, "VRAM")
    if free_bytes < least * slot_bytes:
        raise _too_little(available, "VRAM", needs, least * slot_bytes, limits)
    resident = fill(slices, free_bytes - least * slot_bytes, limits.vram_slices, "VRAM")
    kept = sum(part.slot_bytes for part in slices if part.index in resident)
    return min(wanted, (free_bytes - kept) // slot_bytes), resident


def _too_little(
    available: int, where: str, needs: Needs, moving_bytes: int, limits: Limits
) -> CapacityError:
    wanted = needs.total_bytes + moving_bytes
    remedy, margin, kept_free = " or free some memory", 0.0, ""
    if where == "VRAM":
        remedy = " or free some VRAM"
        if available == limits.vram_bytes:
            remedy = " or raise --vram"
        elif limits.vram_bytes is not None:  # a draft has taken of it, or the device has no more
            remedy = ", raise --vram or free some VRAM"
        margin, kept_free = _MARGIN, f", and {_MARGIN:.0%} must stay free"
    missing = int(wanted / (1 - margin)) + 1 - available
    return CapacityError(
        f"{human_bytes(available)} of {where} are {human_bytes(missing)} too few: layers on the "
        f"way take {human_bytes(moving_bytes)}, KV cache {human_bytes(needs.cache_bytes)}, "
        f"activations {human_bytes(needs.activation_bytes)}, decoding "
        f"{human_bytes(needs.decode_bytes)}, constants {human_bytes(needs.constant_bytes)}"
        f"{kept_free}; lower --context{remedy}"
    )


def _ring_bytes(slot_bytes: int) -> int:
    return NUM_BUFFERS * min(BUFFER_BYTES, slot_bytes)
