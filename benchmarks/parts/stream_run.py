"""The figures of one run of stream.py, and the limits that several of its steps divide by."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from disk_alone import Way, probe_ways, read_pass
from parts.passes import DEVICE, measure_link_limit, time_passes

from layerpack.cli.options.sizes import parse_size
from layerpack.formats.pack import Pack
from layerpack.formats.units import GIB
from layerpack.runtime.bench.machine import describe_machine
from layerpack.runtime.core.slices import pass_slices
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits


class Run:
    """The figures so far, and what several steps need. `note` prints and keeps a figure."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path: Path = arguments.pack
        self.pack = Pack.open(self.path)
        self.slices = pass_slices(self.pack)
        self.total_bytes = sum(part.length_bytes for part in self.slices)
        self.context: int = arguments.context
        self.passes: int = arguments.passes
        self.draft: Path | None = arguments.draft
        self.probe_s: float = arguments.disk_seconds
        self.vram: str = arguments.vram
        self.result: dict[str, Any] = {
            "machine": describe_machine(DEVICE),
            "pack": self.pack.manifest.source.id,
            "bytes a pass": self.total_bytes,
        }
        self.begin_s = time.perf_counter()
        self.one_s: float | None = None
        self.decoded_s: float | None = None
        self.disk_gb_s: list[float] = []

    def note(self, name: str, value: Any) -> None:
        """Print and keep one figure."""
        self.result[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        print(f"[{time.perf_counter() - self.begin_s:6.1f} s] {text}", flush=True)

    @functools.cached_property
    def link_gb_s(self) -> float:
        """GB/s of copies alone over the whole pass; measured when first asked for."""
        gb_s, register_s = measure_link_limit(self.slices)
        self.note("link GB/s", round(gb_s, 2))
        self.note("map and register s", round(register_s, 2))
        return gb_s

    @functools.cached_property
    def way(self) -> Way:
        """The best way to read; probed when first asked for."""
        ways = probe_ways(self.slices, seconds=self.probe_s)
        self.note("disk probes GB/s", {way.title: round(way.gb_s, 3) for way in ways})
        return ways[0]

    def read_disk_alone(self) -> None:
        """One more whole pass read alone."""
        self.disk_gb_s.append(read_pass(self.slices, self.way))
        self.note("disk alone GB/s", [round(gb_s, 3) for gb_s in self.disk_gb_s])

    @contextmanager
    def opened(
        self,
        limits: Limits,
        *,
        context: int | None = None,
        kv_tokens: int | None = None,
        draft: Path | None = None,
        nodes: int = 0,
    ) -> Iterator[Model]:
        """A model under the cap of the run, with peak memory counted from here."""
        gc.collect()
        cap_vram(self.vram)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        options = OpenOptions(
            device="cuda",
            limits=limits,
            context_tokens=context or self.context + 300,
            kv_tokens=kv_tokens,
            draft=None if draft is None else str(draft),
            proposed_tokens=nodes,
        )
        with Model.open(self.path, options) as model:
            yield model

    def in_host(self, count: int | None = None) -> Limits:
        """No layer in VRAM, and so many (all) in host memory."""
        return Limits(vram_slices=0, host_slices=len(self.slices) if count is None else count)

    def time(
        self,
        model: Model,
        *,
        tokens: int = 1,
        warm_up: int = 1,
        nodes: int = 0,
    ) -> list[float]:
        """See `time_passes`."""
        return time_passes(
            model,
            context=self.context if tokens < 2048 else 0,
            tokens=tokens,
            passes=self.passes,
            warm_up=warm_up,
            nodes=nodes,
        )

    def note_peak(self, what: str) -> None:
        """Peak VRAM since the model was opened."""
        self.note(f"peak VRAM GiB, {what}", round(torch.cuda.max_memory_allocated() / GIB, 3))


def cap_vram(vram: str) -> None:
    """Bound what torch may allocate in this process; opening with a lower bound lowers it."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, parse_size(vram) / total), DEVICE)
