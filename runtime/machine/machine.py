"""What a machine is to the planner."""

from __future__ import annotations

from dataclasses import dataclass

READ_THREADS = 8
"""Threads that read the disk where no number was found to be better."""
DECODE_THREADS = 16
"""The fewest threads that read a compressed pack: most of their time they decompress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts for the planner. Bandwidths in GB/s (1e9 bytes); 0 where there is no such link.

    `vram_free_bytes` is what this process may still allocate; None on a CPU. `host_total_bytes` is
    all the memory of the machine or cgroup (0: not known). `disk_gb_s` is what `disk_threads`
    threads read. `decode_gb_s` counts the bytes that come out when DECODE_THREADS threads
    decompress; 0 where the pack is plain.
    """

    device: str
    vram_free_bytes: int | None
    host_free_bytes: int
    host_total_bytes: int = 0
    link_gb_s: float
    disk_gb_s: float
    disk_threads: int = READ_THREADS
    decode_gb_s: float = 0.0
