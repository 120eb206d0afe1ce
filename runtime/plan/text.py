"""A plan in words and as JSON: where layers live, what takes the memory, what bounds a pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from layerpack.formats.units import human_bytes
from layerpack.runtime.core.slices import Kind, Slice
from layerpack.runtime.machine.machine import Machine
from layerpack.runtime.plan.plan import Plan, Tier

_WHERE = {Tier.VRAM: "VRAM", Tier.HOST: "host memory", Tier.DISK: "disk"}
_MOST_RANGES = 6


def plan_text(plan: Plan, machine: Machine, *, each_layer: bool = False) -> str:
    """Several lines, with no newline at the end; `each_layer` adds one for every layer."""
    lines = [f"device       {machine.device}"]
    if machine.vram_free_bytes is not None:
        lines += _vram_lines(plan)
    lines.append(
        f"host memory  {human_bytes(machine.host_free_bytes)} free, "
        f"{human_bytes(plan.host_budget_bytes)} of it for weights"
    )
    lines.append("layers live in")
    lines += [_tier_line(plan, tier) for tier in Tier if plan.slices_in(tier)]
    lines.append("a pass moves")
    lines += _link_lines(plan, machine) or ["  nothing"]
    lines.append(_pass_line(plan, machine))
    if plan.compression is not None:
        lines.append(plan.compression.text)
    if each_layer:
        lines += [
            f"  {part.title:<10} {human_bytes(part.length_bytes):>9}  {_WHERE[tier]}"
            for part, tier in zip(plan.slices, plan.tiers, strict=True)
        ]
    return "\n".join(lines)


def plan_facts(plan: Plan, machine: Machine) -> dict[str, Any]:
    """The same as JSON values; sizes in bytes, times in seconds, bandwidths in GB/s (1e9)."""
    on_gpu = machine.vram_free_bytes is not None
    return {
        "device": machine.device,
        "vram": _vram_parts(plan) | {"total": plan.vram_bytes} if on_gpu else None,
        "host": {
            "total": machine.host_total_bytes,
            "free": machine.host_free_bytes,
            "for_weights": plan.host_budget_bytes,
        },
        "tiers": {
            tier.value: {"layers": len(plan.slices_in(tier)), "bytes": plan.bytes_in(tier)}
            for tier in Tier
        },
        "slots": {"count": plan.num_slots, "bytes": plan.slot_bytes},
        "ring": {"buffers": plan.num_buffers, "bytes": plan.buffer_bytes},
        "link_gb_s": machine.link_gb_s if on_gpu else None,
        "disk_gb_s": machine.disk_gb_s,
        "disk_threads": machine.disk_threads,
        "streamed_bytes": plan.streamed_bytes,
        "disk_bytes": plan.disk_bytes,
        "link_s": plan.link_s,
        "disk_s": plan.disk_s,
        "compression": _compression_facts(plan, machine),
        "pass_s": plan.pass_s,
        "layers": [
            {"name": part.title, "tier": tier.value, "bytes": part.length_bytes}
            for part, tier in zip(plan.slices, plan.tiers, strict=True)
        ],
    }


def _compression_facts(plan: Plan, machine: Machine) -> dict[str, Any] | None:
    effect = plan.compression
    if effect is None:
        return None
    return {
        "stored_bytes": effect.stored_bytes,
        "raw_bytes": effect.raw_bytes,
        "decode_gb_s": machine.decode_gb_s,
        "decode_s": effect.decode_s,
        "unpacked_pass_s": effect.plain_s,
        "pays": effect.pays,
    }


def _vram_parts(plan: Plan) -> dict[str, int]:
    needs = plan.needs
    parts = {
        "kv_cache": needs.cache_bytes,
        "activations": needs.activation_bytes,
        "decoding": needs.decode_bytes,
        "constants": needs.constant_bytes,
        "slots": plan.num_slots * plan.slot_bytes,
        "resident_weights": plan.bytes_in(Tier.VRAM),
        "margin": plan.margin_bytes,
    }
    return parts | {"left": plan.vram_bytes - sum(parts.values())}


def _vram_lines(plan: Plan) -> Iterable[str]:
    yield f"VRAM         {human_bytes(plan.vram_bytes)} may be used"
    notes = {}
    if plan.num_slots:
        notes["slots"] = f"   {plan.num_slots} of {human_bytes(plan.slot_bytes)}"
    for name, taken in _vram_parts(plan).items():
        title = "KV cache" if name == "kv_cache" else name.replace("_", " ")
        yield f"  {title:<18}{human_bytes(taken):>9}{notes.get(name, '')}"


def _tier_line(plan: Plan, tier: Tier) -> str:
    parts = plan.slices_in(tier)
    size = human_bytes(plan.bytes_in(tier))
    return f"  {_WHERE[tier]:<12}{len(parts):4d}{size:>11}   {_folded(parts)}"


def _folded(parts: Sequence[Slice]) -> str:
    """`layers 0-40, head 0-5`, or only how many where there are too many ranges."""
    texts = []
    for kind, name in ((Kind.LAYER, "layer"), (Kind.HEAD, "lm_head part")):
        numbers = [part.number for part in parts if part.kind is kind]
        ranges = _ranges(numbers)
        if len(ranges) > _MOST_RANGES:
            texts.append(f"{len(numbers)} {name}s, evenly spread")
        elif ranges:
            texts.append(f"{name}{'s' * (len(numbers) > 1)} {', '.join(ranges)}")
    return "; ".join(texts)


def _ranges(numbers: Sequence[int]) -> list[str]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def _link_lines(plan: Plan, machine: Machine) -> list[str]:
    lines = []
    if machine.vram_free_bytes is not None and plan.streamed_bytes:
        lines.append(_link_line("link", plan.streamed_bytes, machine.link_gb_s, plan.link_s, ""))
    if plan.disk_bytes:
        how = f", {plan.read_threads} threads reading"
        lines.append(_link_line("disk", plan.disk_bytes, machine.disk_gb_s, plan.disk_s, how))
    return lines


def _link_line(name: str, moved: int, gb_s: float, seconds: float, how: str) -> str:
    return f"  {name:<12}{human_bytes(moved):>15} at {gb_s:.2f} GB/s: {seconds:.3f} s{how}"


def _pass_line(plan: Plan, machine: Machine) -> str:
    if not plan.pass_s:
        return "no link bounds a pass, only the arithmetic"
    times_s = {"disk": plan.disk_s, "link": plan.link_s, "decompression": plan.decode_s}
    slowest = max(times_s, key=lambda name: times_s[name])
    beside = "" if machine.vram_free_bytes is not None else ", and the CPU's arithmetic"
    return f"a pass takes {plan.pass_s:.3f} s: the time of the {slowest}{beside}"
