"""`layerpack bench`: each row opened, warmed up, timed and closed, one after the other.

The limits stand beside the rows: the links that a row crossed are measured right after it, and
every ratio is taken against the best of the run. What one row cannot do (memory, a refusal of the
system) ends that row alone.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerpack.formats.errors import LayerpackError, PackError
from layerpack.formats.manifest import Blob
from layerpack.formats.pack import Pack
from layerpack.runtime import measure
from layerpack.runtime.bench_load import evict
from layerpack.runtime.bench_network import open_network
from layerpack.runtime.bench_report import LeftOut, Report, RowResult
from layerpack.runtime.bench_rows import ROWS, Method, Ours, Row
from layerpack.runtime.bench_sample import sixteen_bit_pack
from layerpack.runtime.machine import host_memory, pick_device
from layerpack.runtime.model import Model, OpenOptions
from layerpack.runtime.needs import PREFILL_TOKENS
from layerpack.runtime.plan import Plan, Tier
from layerpack.runtime.slices import head_weight, pass_slices

_SAMPLE_BYTES = 4 << 30
_MIN_SAMPLE_LAYERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """`rows`: names, all if empty. `num_layers`: how many the rows of other methods are timed with
    (None: about 4 GB of them). `row_s`: no further pass of a row begins after so many seconds.
    `scratch`: where 16-bit layers are written for a while (None: beside the pack).
    """

    device: str = "auto"
    context_tokens: int = 512
    passes: int = 5
    rows: tuple[str, ...] = ()
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    num_layers: int | None = None
    row_s: float = 30.0
    scratch: Path | None = None


def run_bench(
    path: Path, options: BenchOptions, *, on_row: Callable[[Row], None] = lambda _: None
) -> Report:
    """Measure the rows; minutes. `on_row` is called before each of them.

    Ctrl-C ends it early: what was measured comes back. Raises PackError, CapacityError,
    StreamError. Nothing is left behind: no file, thread or registration.
    """
    pack = Pack.open(path)
    if pack.manifest.compression is not None:
        raise PackError(
            f"{path}: is compressed, which the loaders to compare with cannot read; run "
            "`layerpack unpack` first and time the plain pack"
        )
    device = pick_device(options.device)
    rows, left_out = [], []
    interrupted = False
    with _capped(device, options.vram_bytes), _Bench(pack, device, options) as bench:
        try:
            for row in ROWS:
                if options.rows and row.name not in options.rows:
                    continue
                reason = row.why_not(device.type)
                if reason is None:
                    on_row(row)
                    try:
                        rows.append(bench.run(row))
                    except (LayerpackError, OSError, RuntimeError) as error:  # out of memory, too
                        reason = _one_line(error)
                    finally:
                        _let_go(device)
                if reason is not None:
                    left_out.append(
                        LeftOut(name=row.name, switches=row.way.switches, reason=reason)
                    )
        except KeyboardInterrupt:
            interrupted = True
    return Report(
        machine=describe_machine(device),
        pack=pack.manifest.source.id,
        num_layers=pack.manifest.model.num_layers,
        context_tokens=options.context_tokens,
        link_gb_s=max(bench.link_gb_s, default=None),
        disk_gb_s=max(bench.disk_gb_s, default=None),
        rows=tuple(rows),
        left_out=tuple(left_out),
        interrupted=interrupted,
    )


class _Bench:
    """One run's state: the scratch folder, the 16-bit layers once made, the links' speeds."""

    def __init__(self, pack: Pack, device: torch.device, options: BenchOptions) -> None:
        self._pack = pack
        self._device = device
        self._options = options
        self._stack = contextlib.ExitStack()
        self._decoded: Pack | None = None
        self.link_gb_s: list[float] = []
        self.disk_gb_s: list[float] = []

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, row: Row) -> RowResult:
        """Open, warm up, time, close, and measure the links that were crossed."""
        result = (
            self._run_method(row, row.way)
            if isinstance(row.way, Method)
            else self._run_ours(row, row.way)
        )
        _let_go(self._device)
        self._measure_links(link=result.link_bytes > 0, disk=result.disk_bytes > 0)
        return result

    def _run_ours(self, row: Row, way: Ours) -> RowResult:
        options = self._options
        opening = OpenOptions(
            device=str(self._device),
            limits=way.limits(options.vram_bytes, options.ram_bytes),
            context_tokens=options.context_tokens + options.passes + 1,
            direct=way.direct,
            may_register=way.may_register,
            attention=way.attention,
        )
        from_disk = way.tier is Tier.DISK and not way.direct
        with Model.open(self._pack.path, opening) as model:
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
        if self._options.ram_bytes is not None:
            room = min(room, self._options.ram_bytes)
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
        count = self._options.num_layers or max(_MIN_SAMPLE_LAYERS, _SAMPLE_BYTES // each)
        count = min(count, len(layers))
        if not sixteen_bit:
            return self._pack, count
        if self._decoded is None:
            folder = self._options.scratch or self._pack.path.absolute().parent
            made = tempfile.TemporaryDirectory(prefix=".layerpack-bench-", dir=folder)
            scratch = Path(self._stack.enter_context(made))
            self._decoded = sixteen_bit_pack(self._pack, scratch, num_layers=count)
        return self._decoded, count

    def _time(self, network: Any, before_pass: Callable[[], None] | None = None) -> list[float]:
        return time_passes(
            network,
            device=self._device,
            context_tokens=self._options.context_tokens,
            passes=self._options.passes,
            budget_s=self._options.row_s,
            before_pass=before_pass,
        )

    def _evict(self) -> None:
        for path in {part.path for part in pass_slices(self._pack)}:
            evict(path)

    def _measure_links(self, *, link: bool, disk: bool) -> None:
        if link:
            self.link_gb_s.append(measure.measure_link(self._device))
        if disk:
            # Other bytes each time: what was read last may still be in a cache of the drive.
            slices = pass_slices(self._pack)
            first = len(self.disk_gb_s) * len(slices) // 3 % len(slices)
            self.disk_gb_s.append(measure.measure_disk(slices[first:] + slices[:first]))

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
            document=row.document,
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


def time_passes(
    network: Any,
    *,
    device: torch.device,
    context_tokens: int,
    passes: int,
    budget_s: float,
    before_pass: Callable[[], None] | None = None,
) -> list[float]:
    """Seconds of each pass of one new token, after a prefill of `context_tokens` that warms up.

    At least one is timed; after `budget_s` no further one begins. Batch size 1.
    """
    from transformers.cache_utils import DynamicCache

    vocabulary = network.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def run(tokens: int) -> float:
        ids = torch.randint(vocabulary, (1, tokens), generator=generator).to(device)
        begin_s = time.perf_counter()
        out = network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        int(out.logits[0, -1].argmax())  # a user waits for the token
        return time.perf_counter() - begin_s

    with torch.inference_mode():
        cache = DynamicCache(config=network.config)
        for first in range(0, max(1, context_tokens), PREFILL_TOKENS):
            run(min(PREFILL_TOKENS, max(1, context_tokens) - first))
        begin_s = time.perf_counter()
        times_s: list[float] = []
        while len(times_s) < passes and (not times_s or time.perf_counter() - begin_s < budget_s):
            if before_pass is not None:
                before_pass()
            times_s.append(run(1))
    return times_s


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_cores": os.cpu_count(),
        "host_free_bytes": host_memory()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@contextlib.contextmanager
def _capped(device: torch.device, vram_bytes: int | None) -> Iterator[None]:
    """All rows under the same bound of VRAM, which ends with them."""
    if device.type != "cuda" or vram_bytes is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, vram_bytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _let_go(device: torch.device) -> None:
    """Give back what a row's allocators keep, so that rows do not starve each other."""
    gc.collect()
    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    # What tensor.pin_memory() took is kept as well; before 2.13 torch has no public way to let go.
    empty = getattr(torch.accelerator, "empty_host_cache", None)
    if empty is None:
        empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


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


def _one_line(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the device ran out of memory: " + str(error).split(". ")[0]
    return " ".join(str(error).split()) or repr(error)
