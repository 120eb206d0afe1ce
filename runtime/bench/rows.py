"""The rows of `layerpack bench`: ways to bring a layer's weights to the device, as switches.

Rows 1 to 9 of the history that layerpack started from (Qwen2.5-72B on an 8 GB laptop, 51 to 300 s
a step) can be told apart by five switches; the rest are layerpack's own tiers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from layerpack.runtime.plan.plan import Limits, Tier

_DEFAULT = "default attention"


class Pinning(Enum):
    """What happens on the host between a layer's file and the copy to the device."""

    NONE = "pageable"
    TENSOR = "pinned per tensor"
    BUFFER = "one pinned buffer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A layer's safetensors file becomes a dict of tensors, is pinned, copied, bound and dropped.

    `prefetchers` threads do that for the layers ahead; with 0 each layer is loaded, awaited and
    computed, one after the other. `head_resident` keeps lm_head on the device.
    """

    sixteen_bit: bool
    prefetchers: int
    pinning: Pinning
    head_resident: bool = True
    attention: str | None = None

    @property
    def switches(self) -> str:
        """All of it in one line."""
        order = {0: "synchronous", 1: "one prefetch thread", 2: "two prefetch threads"}
        return ", ".join(
            (
                "16 bit" if self.sixteen_bit else "NF4",
                order[self.prefetchers],
                self.pinning.value,
                f"lm_head {'resident' if self.head_resident else 'streamed'}",
                self.attention or _DEFAULT,
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """layerpack's own stream, opened as `generate` opens it, with its slices kept in `tier`."""

    tier: Tier
    direct: bool | None = None
    may_register: bool = True
    attention: str | None = None

    @property
    def switches(self) -> str:
        """All of it in one line."""
        where = {
            Tier.VRAM: "VRAM filled, the rest streamed",
            Tier.HOST: "host memory in place" if self.may_register else "host memory copied once",
            Tier.DISK: "disk, direct reads" if self.direct else "disk, buffered reads",
        }
        return f"layerpack: {where[self.tier]}, {self.attention or _DEFAULT}"

    def limits(self, vram_bytes: int | None, ram_bytes: int | None) -> Limits:
        """What the planner is told so that slices live in `tier`, as far as they fit."""
        return Limits(
            vram_bytes=vram_bytes,
            ram_bytes=ram_bytes,
            vram_slices=None if self.tier is Tier.VRAM else 0,
            host_slices=0 if self.tier is Tier.DISK else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    way: Method | Ours

    def why_not(self, device_type: str) -> str | None:
        """Why the row makes no sense on a device of this type; None if it does."""
        if device_type == "cuda":
            return None
        if isinstance(self.way, Method):
            pinned = self.way.pinning is not Pinning.NONE
            return "pinned memory matters to a CUDA device only" if pinned else None
        if self.way.tier is Tier.VRAM:
            return "there is no VRAM without a CUDA device"
        return None if self.way.may_register else "nothing is registered without a CUDA device"


def _method(
    bits: int,
    prefetchers: int,
    pinning: Pinning,
    *,
    head_resident: bool = True,
    attention: str | None = None,
) -> Method:
    return Method(
        sixteen_bit=bits == 16,
        prefetchers=prefetchers,
        pinning=pinning,
        head_resident=head_resident,
        attention=attention,
    )


_PER_TENSOR, _PAGEABLE = Pinning.TENSOR, Pinning.NONE

ROWS = (
    Row(name="bf16-eager", way=_method(16, 0, _PER_TENSOR, attention="eager")),
    Row(name="bf16-sync", way=_method(16, 0, _PER_TENSOR)),
    Row(name="bf16-sync-pageable", way=_method(16, 0, _PAGEABLE)),
    Row(name="bf16-async", way=_method(16, 1, _PER_TENSOR)),
    Row(name="bf16-async-pageable", way=_method(16, 1, _PAGEABLE)),
    Row(name="bf16-dual-buffer", way=_method(16, 2, Pinning.BUFFER)),
    Row(name="bf16-dual", way=_method(16, 2, _PER_TENSOR)),
    Row(name="bf16-dual-head", way=_method(16, 2, _PER_TENSOR, head_resident=False)),
    Row(name="nf4-dual-head", way=_method(4, 2, _PER_TENSOR, head_resident=False)),
    Row(name="nf4-sync", way=_method(4, 0, _PER_TENSOR, head_resident=False)),
    Row(name="nf4-sync-pageable", way=_method(4, 0, _PAGEABLE, head_resident=False)),
    Row(name="nf4-async-pageable", way=_method(4, 1, _PAGEABLE, head_resident=False)),
    Row(name="host", way=Ours(tier=Tier.HOST)),
    Row(name="host-eager", way=Ours(tier=Tier.HOST, attention="eager")),
    Row(name="host-copied", way=Ours(tier=Tier.HOST, may_register=False)),
    Row(name="vram", way=Ours(tier=Tier.VRAM)),
    Row(name="disk", way=Ours(tier=Tier.DISK, direct=True)),
    # Last, as it drives the pack out of the page cache.
    Row(name="disk-buffered", way=Ours(tier=Tier.DISK, direct=False)),
)
