"""Passes of an open model timed, the link alone timed, and what must not grow: for stream.py."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from layerpack.formats.read import BufferedReader
from layerpack.formats.units import GIB
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.model import Model
from layerpack.runtime.stream.host import HostStore

DEVICE = torch.device("cuda", 0)
GROWTH_FIRST, GROWTH_PASSES = 10, 100


def measure_link_limit(slices: Sequence[Slice]) -> tuple[float, float]:
    """(GB/s of copies alone over the whole pass, seconds to map and register it)."""
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
        return total / 1e9 / statistics.median(times_s[1:]), load_s


def time_passes(
    model: Model,
    *,
    context: int,
    tokens: int,
    passes: int,
    warm_up: int,
    within: AbstractContextManager[None] = nullcontext(),
) -> list[float]:
    """Seconds of each pass with `tokens` new tokens over a cache of `context`.

    A prefill of `context` goes before them, and `warm_up` passes, these `within` as well. The
    cache is cropped back after each pass, so all passes are alike.
    """
    from layerpack.runtime.kv.reserved import reserved_cache

    network = model.network
    times_s = []

    def run() -> float:
        torch.cuda.synchronize()
        begin_s = time.perf_counter()
        keep = tokens if context else 1
        out = network(_ids(tokens), past_key_values=cache, use_cache=True, logits_to_keep=keep)
        int(out.logits[0, -1].argmax())  # a user waits for the token
        torch.cuda.synchronize()
        return time.perf_counter() - begin_s

    with torch.inference_mode():
        cache = reserved_cache(network.config, context + tokens)
        if context:
            network(_ids(context), past_key_values=cache, use_cache=True, logits_to_keep=1)
        with within:
            for _ in range(warm_up + passes):
                if not context:
                    cache = reserved_cache(network.config, tokens)
                times_s.append(run())
                if context:
                    cache.crop(-tokens)  # how many to take off: so in every transformers 5
    return times_s[warm_up:]


def _ids(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, count), device=DEVICE)


def measure_growth(model: Model, *, context: int) -> dict[str, int]:
    """How much the marks differ between the tenth pass and a hundred passes later."""
    from layerpack.runtime.kv.reserved import reserved_cache

    marks = []
    with torch.inference_mode():
        cache = reserved_cache(model.network.config, context + 1)
        model.network(_ids(context), past_key_values=cache, use_cache=True, logits_to_keep=1)
        for number in range(1, GROWTH_FIRST + GROWTH_PASSES + 1):
            model.network(_ids(1), past_key_values=cache, use_cache=True)
            cache.crop(-1)
            if number in (GROWTH_FIRST, GROWTH_FIRST + GROWTH_PASSES):
                torch.cuda.synchronize()
                marks.append(memory_marks())
    return {name: marks[1][name] - marks[0][name] for name in marks[0]}


def memory_marks() -> dict[str, int]:
    """What must not grow: resident host memory that is not file pages, VRAM, open files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "host_bytes": int(status["RssAnon"].split()[0]) * 1024,
        "vram_bytes": torch.cuda.memory_allocated(DEVICE),
        "files": len(os.listdir("/proc/self/fd")),
    }


def summary(times_s: list[float]) -> dict[str, Any]:
    """Median and spread."""
    return {
        "median_s": round(statistics.median(times_s), 4),
        "min_s": round(min(times_s), 4),
        "max_s": round(max(times_s), 4),
        "passes": len(times_s),
    }


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
