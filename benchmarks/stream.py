"""How close a pass comes to the links' limits: every tier, on the machine at hand, in one run.

    python benchmarks/make_pack.py qwen2.5-72b /data/random-72b
    python benchmarks/stream.py /data/random-72b --vram 8GiB --json result.json

Each ratio's limit is measured in the same run: the link by copies alone from registered mappings,
the disk by direct reads alone. Passes are transformers' whole forward (attention over a cache of
--context tokens, norms, lm_head). Medians, with the least and the most beside them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from layerpack.cli.sizes import parse_size
from layerpack.formats.pack import Pack
from layerpack.formats.read import BufferedReader
from layerpack.formats.units import GIB, MIB
from layerpack.runtime.host import HostStore
from layerpack.runtime.measure import measure_disk
from layerpack.runtime.model import Model, OpenOptions
from layerpack.runtime.plan import Limits, Tier
from layerpack.runtime.slices import pass_slices

DEVICE = torch.device("cuda", 0)


def describe_machine() -> dict[str, Any]:
    """What the figures belong to."""
    return {
        "gpu": torch.cuda.get_device_name(DEVICE),
        "cpu_cores": os.cpu_count(),
        "host_memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def summary(times_s: list[float]) -> dict[str, Any]:
    """Median and spread."""
    return {
        "median_s": round(statistics.median(times_s), 4),
        "min_s": round(min(times_s), 4),
        "max_s": round(max(times_s), 4),
        "passes": len(times_s),
    }


def measure_link_limit(pack: Pack) -> tuple[float, float]:
    """(GB/s of copies alone over the whole pass, seconds to map and register it)."""
    slices = pass_slices(pack)
    with HostStore(DEVICE) as store:
        begin_s = time.perf_counter()
        store.load(slices, BufferedReader())
        load_s = time.perf_counter() - begin_s
        target = torch.empty(
            max(part.slot_bytes for part in slices), dtype=torch.uint8, device=DEVICE
        )
        times_s = []
        for _ in range(6):
            torch.cuda.synchronize()
            begin_s = time.perf_counter()
            for tensor in store.tensors.values():
                target[: tensor.numel()].copy_(tensor, non_blocking=True)
            torch.cuda.synchronize()
            times_s.append(time.perf_counter() - begin_s)
        total = sum(part.length_bytes for part in slices)
        del target
        return total / 1e9 / statistics.median(times_s[1:]), load_s


def measure_disk_limit(pack: Pack, seconds: float) -> tuple[float, dict[str, float]]:
    """(best GB/s of direct reads alone, GB/s by threads and piece size)."""
    slices = pass_slices(pack)
    found = {
        f"{threads} threads, {piece // MIB} MiB": round(
            measure_disk(slices, seconds=seconds, num_threads=threads, piece_bytes=piece), 3
        )
        for threads in (4, 8, 16)
        for piece in (4 * MIB, 16 * MIB)
    }
    return max(found.values()), found


@contextmanager
def opened(path: Path, limits: Limits, **options: Any) -> Iterator[Model]:
    """A model, with peak memory counted from here."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    with Model.open(path, OpenOptions(device="cuda", limits=limits, **options)) as model:
        yield model


def time_passes(model: Model, *, context: int, tokens: int, passes: int) -> list[float]:
    """Seconds of each pass with `tokens` new tokens over a cache of `context`.

    One more goes before them, to warm up. The cache is cropped back after each pass, so all
    passes are alike.
    """
    from transformers.cache_utils import DynamicCache

    network = model.network
    times_s = []
    with torch.inference_mode():
        cache = DynamicCache(config=network.config)
        if context:
            network(_ids(context), past_key_values=cache, use_cache=True, logits_to_keep=1)
        for _ in range(passes + 1):
            if not context:
                cache = DynamicCache(config=network.config)
            torch.cuda.synchronize()
            begin_s = time.perf_counter()
            keep = tokens if context else 1
            out = network(_ids(tokens), past_key_values=cache, use_cache=True, logits_to_keep=keep)
            int(out.logits[0, -1].argmax())  # a user waits for the token
            torch.cuda.synchronize()
            times_s.append(time.perf_counter() - begin_s)
            del out
            if context:
                cache.crop(context)
    return times_s[1:]


def _ids(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, count), device=DEVICE)


def memory_marks() -> dict[str, int]:
    """What must not grow: resident host memory that is not file pages, VRAM, open files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "host_bytes": int(status["RssAnon"].split()[0]) * 1024,
        "vram_bytes": torch.cuda.memory_allocated(DEVICE),
        "files": len(os.listdir("/proc/self/fd")),
    }


def run_growth(model: Model, *, context: int, passes: int) -> dict[str, Any]:
    """Marks after the tenth pass and after `passes`."""
    from transformers.cache_utils import DynamicCache

    marks = []
    with torch.inference_mode():
        cache = DynamicCache(config=model.network.config)
        model.network(_ids(context), past_key_values=cache, use_cache=True, logits_to_keep=1)
        for number in range(passes):
            model.network(_ids(1), past_key_values=cache, use_cache=True)
            cache.crop(context)
            if number in (9, passes - 1):
                torch.cuda.synchronize()
                marks.append(memory_marks())
    return {name: marks[1][name] - marks[0][name] for name in marks[0]}


def first_token(path: Path, vram: str) -> dict[str, Any]:
    """Seconds from the start of a new process to its first token, with what it says of itself."""
    command = [sys.executable, "-m", "layerpack.cli.main", "generate", str(path), "--raw"]
    command += ["--prompt", "Hello, world", "--max-new-tokens", "1", "--vram", vram, "-v"]
    runs = []
    for _ in range(3):
        begin_s = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        runs.append((time.perf_counter() - begin_s, done.stderr.strip().splitlines()[-12:]))
    runs.sort(key=lambda run: run[0])
    return {
        "median_s": round(runs[1][0], 2),
        "all_s": [round(r[0], 2) for r in runs],
        "said": runs[1][1],
    }


def run(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:  # noqa: PLR0915
    """All tiers; the JSON document."""
    pack = Pack.open(path)
    count = len(pass_slices(pack))
    context, passes = arguments.context, arguments.passes
    cap = parse_size(arguments.vram)
    result: dict[str, Any] = {"machine": describe_machine(), "pack": pack.manifest.source.id}
    skip = set(arguments.skip.split(","))

    def note(name: str, value: Any) -> None:
        result[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)

    if "first" not in skip:
        note("first token", first_token(path, arguments.vram))
    fraction = cap / torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(fraction, DEVICE)
    link_gb_s, register_s = measure_link_limit(pack)
    note("link GB/s", round(link_gb_s, 2))
    note("map and register s", round(register_s, 2))
    total = sum(part.length_bytes for part in pass_slices(pack))
    note("bytes a pass", total)
    common = {"context_tokens": context + 300}

    with opened(path, Limits(vram_slices=0, host_slices=count), **common) as model:
        once = time_passes(model, context=context, tokens=1, passes=passes)
        note("host tier, 1 token", summary(once))
        one_s = statistics.median(once)
        note("host tier over limit", round(one_s / (total / 1e9 / link_gb_s), 4))
        note("peak VRAM GiB, 1 token", round(torch.cuda.max_memory_allocated(DEVICE) / GIB, 3))
        many = time_passes(model, context=context, tokens=256, passes=passes)
        note("host tier, 256 tokens", summary(many))
        note("256 tokens over 1", round(statistics.median(many) / one_s, 4))
        note("peak VRAM GiB, 256 tokens", round(torch.cuda.max_memory_allocated(DEVICE) / GIB, 3))
        prefill = time_passes(model, context=0, tokens=2048, passes=passes)
        note("host tier, prefill 2048", summary(prefill))
        note("prefill 2048 over 1", round(statistics.median(prefill) / one_s, 4))
        note("peak VRAM GiB, prefill 2048", round(torch.cuda.max_memory_allocated(DEVICE) / GIB, 3))
        if "growth" not in skip:
            note("growth over 90 passes", run_growth(model, context=context, passes=100))

    with opened(path, Limits(vram_bytes=cap, host_slices=count), **common) as model:
        filled = time_passes(model, context=context, tokens=1, passes=passes)
        resident = model.plan.bytes_in(Tier.VRAM) / total
        note("VRAM filled, 1 token", summary(filled))
        note("resident share", round(resident, 4))
        gain = 1 - statistics.median(filled) / one_s
        note("gain over resident share", round(gain / resident, 4) if resident else None)
        note("peak VRAM GiB, filled", round(torch.cuda.max_memory_allocated(DEVICE) / GIB, 3))

    if "disk" not in skip:
        disk_gb_s, table = measure_disk_limit(pack, arguments.disk_seconds)
        note("disk GB/s", table)
        with opened(path, Limits(vram_slices=0, host_slices=count // 2), **common) as model:
            half = time_passes(model, context=context, tokens=1, passes=passes)
            disk_bytes = model.plan.bytes_in(Tier.DISK)
            bound_s = max(disk_bytes / 1e9 / disk_gb_s, total / 1e9 / link_gb_s)
            note("half on disk, 1 token", summary(half))
            note("half on disk over limit", round(statistics.median(half) / bound_s, 4))
        before_gb_s, _ = measure_disk_limit(pack, arguments.disk_seconds)
        with opened(path, Limits(vram_slices=0, host_slices=0), **common) as model:
            all_disk = time_passes(model, context=context, tokens=1, passes=passes)
            pinned = model.plan.num_pieces * model.plan.piece_bytes
            note("pinned GiB in disk tier", round(pinned / GIB, 3))
        after_gb_s, _ = measure_disk_limit(pack, arguments.disk_seconds)
        best = max(disk_gb_s, before_gb_s, after_gb_s)
        note("disk GB/s in all", [disk_gb_s, before_gb_s, after_gb_s])
        note("disk tier, 1 token", summary(all_disk))
        note("disk tier over limit", round(statistics.median(all_disk) / (total / 1e9 / best), 4))
    if "4gib" not in skip:
        with opened(path, Limits(vram_bytes=4 * GIB, host_slices=count), **common) as model:
            four = time_passes(model, context=context, tokens=1, passes=passes)
            note("--vram 4GiB, 1 token", summary(four))
            peak = torch.cuda.max_memory_allocated(DEVICE) / GIB
            note("peak VRAM GiB, --vram 4GiB", round(peak, 3))
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--vram", default="8GiB", help="cap for the whole process")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--disk-seconds", type=float, default=1.0)
    parser.add_argument("--skip", default="", help="of first,growth,disk,4gib")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = run(arguments.pack, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
