"""Whether compression pays on this machine, from measured figures. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerpack.formats.units import human_bytes
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.machine.machine import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionEffect:
    """One pass with the compressed pack, and with the same pack unpacked: predicted seconds.

    `stored_bytes` come from disk in a pass, `raw_bytes` out of them. Unpacked, as many layers
    would live in memory as they do now.
    """

    stored_bytes: int
    raw_bytes: int
    link_s: float
    disk_s: float
    decode_s: float
    plain_disk_s: float

    @property
    def compressed_s(self) -> float:
        """A pass as the pack is: reading, decompressing and copying overlap."""
        return max(self.link_s, self.disk_s, self.decode_s)

    @property
    def plain_s(self) -> float:
        """A pass if it were unpacked."""
        return max(self.link_s, self.plain_disk_s)

    @property
    def pays(self) -> bool:
        """Whether passes are faster than unpacked."""
        return self.compressed_s < self.plain_s

    @property
    def text(self) -> str:
        """One line for people: the two times, and what to do."""
        if not self.raw_bytes:
            return "compressed; nothing comes from disk during a pass, so unpacking gains none"
        times = (
            f"compressed: {human_bytes(self.stored_bytes)} from disk in {self.disk_s:.2f} s, "
            f"decompressed in {self.decode_s:.2f} s: {self.compressed_s:.2f} s a pass; "
            f"unpacked {self.plain_s:.2f} s"
        )
        if self.pays:
            return f"{times}: compression pays"
        if self.compressed_s > self.plain_s:
            return f"{times}: `layerpack unpack` makes it faster"
        return f"{times}: no difference"


def compression_effect(
    on_disk: Sequence[Slice], machine: Machine, link_s: float
) -> CompressionEffect:
    """The effect on a pass that reads the slices `on_disk`; `link_s` is the same either way."""
    stored = sum(part.stored.length_bytes for part in on_disk)
    raw = sum(part.length_bytes for part in on_disk)
    return CompressionEffect(
        stored_bytes=stored,
        raw_bytes=raw,
        link_s=link_s,
        disk_s=_seconds(stored, machine.disk_gb_s),
        decode_s=_seconds(raw, machine.decode_gb_s),
        plain_disk_s=_seconds(raw, machine.disk_gb_s),
    )


def _seconds(count_bytes: int, gb_s: float) -> float:
    return count_bytes / (gb_s * 1e9) if gb_s else 0.0
