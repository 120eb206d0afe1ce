"""A conversion on a GPU against the slower of its two ends: reading the source, writing the pack.

    python benchmarks/convert_gpu.py --work-dir /data/scratch [--model qwen2.5-72b --layers 8]

All in one run, by turns: the source read alone, from the page cache, by as many threads and in
the same pieces as the converter does; files of the pack's sizes written alone, by the pack's own
writer, each fsynced, from bytes that are ready; and `convert(...)`, digests included. Every other
round writes after converting instead of before, as disks tire. A small conversion comes first, on
both devices, for the imports, CUDA's start and a comparison of bytes. Beside each time of a
conversion stands how long its stages waited for others. Rounds end when --seconds are over. Ends
in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from convert_cpu import warm
from parts.make_checkpoint import make_checkpoint
from parts.shapes import SHAPES

from layerpack.convert.api import convert, plan_source
from layerpack.convert.nf4.blocks import useful_workers
from layerpack.convert.options import ConvertOptions
from layerpack.convert.pipeline.crew import Crew
from layerpack.convert.pipeline.weights import WeightReader
from layerpack.convert.plan.plan import Action, ConversionPlan
from layerpack.convert.source.directory import DirectorySource
from layerpack.formats.blob_writer import BlobWriter
from layerpack.formats.manifest.facts import Manifest
from layerpack.formats.units import human_bytes

DEVICE = torch.device("cuda")
OPTIONS = ConvertOptions(device="cuda")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, help="Where about 1.5 times its size is free.")
    parser.add_argument("--source-dir", type=Path, help="Where the source is to be instead.")
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen2.5-72b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=100.0)
    options = parser.parse_args()
    begin_s = time.perf_counter()
    for folder in filter(None, (options.work_dir, options.source_dir)):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=options.work_dir, prefix="convert-gpu-") as scratch,
        tempfile.TemporaryDirectory(dir=options.source_dir, prefix="convert-gpu-") as elsewhere,
    ):
        root = Path(scratch)
        same = check_bytes(root)
        source = (Path(elsewhere) if options.source_dir else root) / "checkpoint"
        source_bytes = make_checkpoint(options.model, source, num_layers=options.layers)
        os.sync()  # or the rounds would write the checkpoint, too
        warm(source)
        print(f"prepared in {time.perf_counter() - begin_s:.1f} s", flush=True)
        with DirectorySource(source) as opened:
            plan = plan_source(opened, OPTIONS)
            steps: dict[str, Callable[[], object]] = {
                "read": lambda: read_alone(plan, opened, DEVICE),
                "write": lambda: write_alone(plan, root / "write"),
                "convert": lambda: run(source, root / "convert"),
            }
            times: dict[str, list[float]] = {name: [] for name in steps}
            waits: list[dict[str, float]] = []
            for number in range(options.rounds):
                round_s = time.perf_counter()
                for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
                    with waits_of_stages() as waited:
                        times[name].append(timed(steps[name]))
                    if name == "convert":
                        waits.append(waited)
                    shutil.rmtree(root / name, ignore_errors=True)
                print({name: round(values[-1], 2) for name, values in times.items()}, flush=True)
                now_s = time.perf_counter()
                if now_s - begin_s + (now_s - round_s) > options.seconds:
                    break
    report(options, times, waits, source_bytes, plan.pack_bytes, same)


def check_bytes(root: Path) -> bool:
    """Whether a small conversion gives the same blobs on the GPU and on the CPU."""
    make_checkpoint("mistral-7b", root / "small", num_layers=1)
    digests = []
    for device in ("cpu", "cuda"):
        manifest = convert(str(root / "small"), root / device, ConvertOptions(device=device))
        digests.append([blob.digest for blob in manifest.blobs])
        shutil.rmtree(root / device)
    shutil.rmtree(root / "small")
    return digests[0] == digests[1]


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def run(source: Path, out: Path) -> Manifest:
    """One conversion."""
    return convert(str(source), out, OPTIONS)


def read_alone(plan: ConversionPlan, source: DirectorySource, device: torch.device) -> None:
    """Every piece of every tensor, in the converter's order, by its number of threads."""
    reader = WeightReader(source, plan.storage, device=device)
    items = [item for place in plan.write_order for item in plan.blobs[place].items]
    assert all(item.action is not Action.KEEP for item in items)
    pieces = [cut for item in items for cut in reader.cuts(item)]
    with ThreadPoolExecutor(useful_workers(device)) as pool:
        for _ in pool.map(lambda piece: reader.read(piece).numel(), pieces):
            pass


def write_alone(plan: ConversionPlan, out: Path) -> None:
    """Files as the pack has them, full of random bytes."""
    out.mkdir()
    random = memoryview(os.urandom(8 << 20))
    for place in plan.write_order:
        blob = plan.blobs[place]
        with BlobWriter(out / blob.file, blob.layout) as writer:
            for entry in blob.layout.tensors:
                for begin in range(0, entry.length_bytes, len(random)):
                    writer.write(entry.name, random[: min(len(random), entry.length_bytes - begin)])


@contextmanager
def waits_of_stages() -> Iterator[dict[str, float]]:
    """Seconds that each thread of a conversion waits for another one."""
    waited: dict[str, float] = defaultdict(float)
    original = Crew.wait

    def wait(self: Crew, ready: Callable[[], bool]) -> None:
        begin_s = time.perf_counter()
        try:
            original(self, ready)
        finally:
            name = threading.current_thread().name.removeprefix("layerpack-")
            waited[name] += time.perf_counter() - begin_s

    Crew.wait = wait  # type: ignore[method-assign]
    result: dict[str, float] = {}
    try:
        yield result
    finally:
        Crew.wait = original  # type: ignore[method-assign]
        result.update({name: round(seconds, 2) for name, seconds in sorted(waited.items())})


def report(
    options: argparse.Namespace,
    times: dict[str, list[float]],
    waits: list[dict[str, float]],
    source_bytes: int,
    pack_bytes: int,
    same: bool,
) -> None:
    """The table and the line of JSON."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["convert"] / max(medians["read"], medians["write"])
    sizes = {"read": source_bytes, "write": pack_bytes, "convert": source_bytes}
    print(f"{options.model}, {options.layers} layers, {useful_workers(DEVICE)} workers")
    for name, values in times.items():
        print(
            f"{name:8} {medians[name]:7.2f} s ({min(values):.2f}-{max(values):.2f})  "
            f"{human_bytes(sizes[name])}, {sizes[name] / medians[name] / 1e9:.2f} GB/s"
        )
    for waited in waits:
        print("waits, s:", ", ".join(f"{name} {seconds}" for name, seconds in waited.items()))
    print(f"convert over the slower of read and write: {ratio:.2f}")
    print(f"the same bytes as on the CPU: {'yes' if same else 'NO'}")
    line: dict[str, Any] = {
        "benchmark": "convert_gpu",
        "model": options.model,
        "layers": options.layers,
        "source_bytes": source_bytes,
        "pack_bytes": pack_bytes,
        "seconds": times,
        "waits_s": waits,
        "ratio": ratio,
        "same_bytes": same,
        "machine": {
            "gpu": torch.cuda.get_device_name(DEVICE),
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
