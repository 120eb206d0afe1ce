"""Where every slice lives, what a run needs beside weights, what the user allows: facts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from layerpack.formats.units import MIB
from layerpack.runtime.core.checked import require_wholes
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.plan.compression import CompressionEffect

BUFFER_BYTES, NUM_BUFFERS = 16 * MIB, 32
"""The ring between disk and slots: buffers of at most so many bytes, and how many of them."""


class Tier(Enum):
    """Where a slice's bytes are between passes."""

    VRAM = "vram"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Memory on the device that a run takes beside weights, in bytes.

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
    `vram_slices` and `host_slices` override the number of slices in a tier. Who sets a limit for
    host memory gets it as far as there is free memory: the planner's own margin is then not kept.
    """

    vram_bytes: int | None = None
    ram_bytes: int | None = None
    num_slots: int = 3
    vram_slices: int | None = None
    host_slices: int | None = None

    def __post_init__(self) -> None:
        """Raises OptionError for values that mean nothing."""
        least = {"vram_bytes": 0, "ram_bytes": 0, "vram_slices": 0, "host_slices": 0}
        require_wholes(self, least | {"num_slots": 2})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`tiers[i]` is where slice i lives. Times are predictions for one pass, in seconds.

    `streamed_bytes` pass through the device's slots in each pass, `disk_bytes` are read from disk
    for it (fewer than come out, if the pack is compressed; then `compression` is set);
    `num_buffers` buffers of `buffer_bytes` are between the disk and the slots, filled by
    `read_threads` threads. Of `vram_bytes` that may be used, `margin_bytes` are left alone;
    `host_budget_bytes` is what weights in host memory may take.
    """

    slices: tuple[Slice, ...]
    tiers: tuple[Tier, ...]
    num_slots: int
    slot_bytes: int
    buffer_bytes: int
    num_buffers: int
    read_threads: int
    needs: Needs
    vram_bytes: int
    margin_bytes: int
    host_budget_bytes: int
    streamed_bytes: int
    disk_bytes: int
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
