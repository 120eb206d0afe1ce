"""One row of `layerpack bench` after the other: opened, warmed up, timed and closed.

The links that a row crossed are measured right after it, on the machine as it was then.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from layerpack.formats.manifest.facts import Blob
from layerpack.formats.pack import Pack
from layerpack.runtime.bench.machine import let_go
from layerpack.runtime.bench.network import open_network
from layerpack.runtime.bench.options import BenchOptions
from layerpack.runtime.bench.passes import time_passes
from layerpack.runtime.bench.report import RowResult
from layerpack.runtime.bench.rows import Method, Ours, Row
from layerpack.runtime.bench.sample import sixteen_bit_pack
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import head_weight, pass_slices
from layerpack.runtime.machine.host_memory import host_memory
from layerpack.runtime.measure.links import measure_disk, measure_link
from layerpack.runtime.measure.page_cache import evict
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.opening import opened
from layerpack.runtime.plan.plan import Plan, Tier
from layerpack.runtime.trace.trace import NO_TRACE

_SAMPLE_BYTES = 4 << 30
_MIN_SAMPLE_LAYERS = 2


class RowRunner:
    """One run's state: the scratch folder, the 16-bit layers once made, the links' speeds."""

    def __init__(
        self, pack: Pack, device: torch.device, options: BenchOptions, patience: Patience
    ) -> None:
        self.options = options
        self._pack = pack
        self._device = device
        self._patience = patience
        self._stack = contextlib.ExitStack()
        self._decoded: Pack | None = None
        self.link_gb_s: list[float] = []
        self.disk_gb_s: list[float] = []

    def close(self) -> None:
        """Delete what was made for the rows."""
        self._stack.close()

    def run(self, row: Row) -> RowResult:
        """Open, warm up, time, close, and measure the links that were crossed."""
        result = (
            self._run_method(row, row.way)
            if isinstance(row.way, Method)
            else self._run_ours(row, row.way)
        )
        let_go(self._device)
        self._measure_links(link=result.link_bytes > 0, disk=result.disk_bytes > 0)
        return result

    def _run_ours(self, row: Row, way: Ours) -> RowResult:
        options = self.options
        how = OpenOptions(
            device=str(self._device),
            limits=way.limits(options.vram_bytes, options.ram_bytes),
            context_tokens=options.context_tokens + options.passes + 1,
            direct=way.direct,
            may_register=way.may_register,
            attention=way.attention,
        )
        from_disk = way.tier is Tier.DISK and not way.direct
        with opened(self._pack, how, trace=NO_TRACE, patience=self._patience) as model:
            times_s = self._time(model.network, before_pass=self._evict if from_disk else None)
            plan = model.plan
        streamed, disk = plan.streamed_bytes, plan.bytes_in(Tier.DISK)
        return self._result(
            row,
            times_s,
            moved_bytes=streamed,
            link_bytes=streamed if self._device.type == "cuda" else 0,
            disk_bytes=disk,
            note=_places(plan) + ("; page cache emptied before each pass" if from_disk else ""),
        )

    def _run_method(self, row: Row, way: Method) -> RowResult:
        pack, count = self._sample(sixteen_bit=way.sixteen_bit)
        head = 0 if way.head_resident else head_weight(pack)[1].length_bytes
        lengths = [_tensor_bytes(blob) for blob in pack.manifest.layers]
        whole, timed = sum(lengths) + head, sum(lengths[:count]) + head
        room, _ = host_memory()
        if self.options.ram_bytes is not None:
            room = min(room, self.options.ram_bytes)
        cold = whole > room  # all layers would not stay in the page cache: nor may the few
        with open_network(pack, way, self._device, num_layers=count, cold=cold) as network:
            times_s = self._time(network)
        scaled = count < len(lengths)
        notes = [f"{count} of {len(lengths)} layers timed, scaled by bytes"] if scaled else []
        notes.append("files out of the page cache" if cold else "files in the page cache")
        return self._result(
            row,
            [seconds * whole / timed for seconds in times_s],
            moved_bytes=whole,
            link_bytes=whole if self._device.type == "cuda" else 0,
            disk_bytes=whole if cold else 0,
            note="; ".join(notes),
            timed_layers=count if scaled else None,
        )

    def _sample(self, *, sixteen_bit: bool) -> tuple[Pack, int]:
        """The pack whose files a method loads, and how many of its layers are timed."""
        layers = self._pack.manifest.layers
        each = 2 * layers[0].num_parameters if sixteen_bit else layers[0].file_bytes
        count = self.options.num_layers or max(_MIN_SAMPLE_LAYERS, _SAMPLE_BYTES // each)
        count = min(count, len(layers))
        if not sixteen_bit:
            return self._pack, count
        if self._decoded is None:
            folder = self.options.scratch or self._pack.path.absolute().parent
            made = tempfile.TemporaryDirectory(prefix=".layerpack-bench-", dir=folder)
            scratch = Path(self._stack.enter_context(made))
            self._decoded = sixteen_bit_pack(self._pack, scratch, num_layers=count)
        return self._decoded, count

    def _time(self, network: Any, before_pass: Callable[[], None] | None = None) -> list[float]:
        return time_passes(
            network,
            context_tokens=self.options.context_tokens,
            passes=self.options.passes,
            budget_s=self.options.row_s,
            patience=self._patience,
            before_pass=before_pass,
        )

    def _evict(self) -> None:
        for path in {part.path for part in pass_slices(self._pack)}:
            evict(path)

    def _measure_links(self, *, link: bool, disk: bool) -> None:
        if link:
            self.link_gb_s.append(measure_link(self._device))
        if disk:
            # Other bytes each time: what was read last may still be in a cache of the drive.
            slices = pass_slices(self._pack)
            first = len(self.disk_gb_s) * len(slices) // 3 % len(slices)
            self.disk_gb_s.append(
                measure_disk(slices[first:] + slices[:first], patience=self._patience)
            )

    def _result(
        self,
        row: Row,
        times_s: Sequence[float],
        *,
        moved_bytes: int,
        link_bytes: int,
        disk_bytes: int,
        note: str,
        timed_layers: int | None = None,
    ) -> RowResult:
        return RowResult(
            name=row.name,
            switches=row.way.switches,
            median_s=statistics.median(times_s),
            min_s=min(times_s),
            max_s=max(times_s),
            passes=len(times_s),
            moved_bytes=moved_bytes,
            link_bytes=link_bytes,
            disk_bytes=disk_bytes,
            timed_layers=timed_layers,
            note=note,
        )


def _tensor_bytes(blob: Blob) -> int:
    return sum(entry.length_bytes for entry in blob.tensors)


def _places(plan: Plan) -> str:
    counts = [
        f"{plan.tiers.count(tier)} {where}"
        for tier, where in (
            (Tier.VRAM, "in VRAM"),
            (Tier.HOST, "in host memory"),
            (Tier.DISK, "on disk"),
        )
        if tier in plan.tiers
    ]
    return "slices: " + ", ".join(counts)
