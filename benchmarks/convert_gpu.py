"""A conversion that quantises on the GPU against the disk and the page cache alone.

    python benchmarks/convert_gpu.py --work-dir /data/scratch [--model qwen2.5-72b --layers 4]

The checkpoint is in the page cache. Two limits are measured beside each conversion: reading all of
its bytes with as many threads as the converter has, and writing files of the pack's sizes, each
brought to the disk (fsync). The bar is the slower one. Timed is `convert(...)`, imports not
included; by turns, medians and spread. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from convert_cpu import warm
from make_checkpoint import make_checkpoint
from shapes import SHAPES

from layerpack.convert.api import convert
from layerpack.convert.options import ConvertOptions
from layerpack.formats.manifest import Manifest
from layerpack.formats.units import MIB, human_bytes

_PIECE_BYTES = 8 * MIB


def read_alone(checkpoint: Path, num_threads: int) -> None:
    """Every byte of every shard, in pieces, by threads."""
    pieces = [
        (file, begin)
        for file in sorted(checkpoint.glob("*.safetensors"))
        for begin in range(0, file.stat().st_size, _PIECE_BYTES)
    ]
    handles = {file: os.open(file, os.O_RDONLY) for file, _ in pieces}

    def read(piece: tuple[Path, int]) -> int:
        return len(os.pread(handles[piece[0]], _PIECE_BYTES, piece[1]))

    with ThreadPoolExecutor(num_threads) as pool:
        sum(pool.map(read, pieces))
    for handle in handles.values():
        os.close(handle)


def write_alone(folder: Path, sizes_bytes: list[int]) -> None:
    """Files of these sizes, each on the disk before the next begins, as the converter does it."""
    folder.mkdir()
    data = memoryview(os.urandom(64 * MIB))
    for number, size_bytes in enumerate(sizes_bytes):
        with open(folder / str(number), "wb", buffering=0) as file:
            for begin in range(0, size_bytes, len(data)):
                file.write(data[: min(len(data), size_bytes - begin)])
            os.fsync(file.fileno())
    shutil.rmtree(folder)


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, help="Where about 2.5 times its size is free.")
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen2.5-72b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    assert transformers.Qwen2ForCausalLM  # imported now, not in the first conversion
    times: dict[str, list[float]] = {"read alone": [], "write alone": [], "convert": []}
    with tempfile.TemporaryDirectory(dir=options.work_dir, prefix="convert-gpu-") as scratch:
        checkpoint, out = Path(scratch) / "checkpoint", Path(scratch) / "out"
        source_bytes = make_checkpoint(options.model, checkpoint, num_layers=options.layers)
        os.sync()
        warm(checkpoint)
        wanted = ConvertOptions(device=options.device)
        manifest: Manifest = convert(str(checkpoint), out, wanted)  # the first warms up CUDA
        sizes_bytes = [blob.file_bytes for blob in manifest.blobs]
        for _ in range(options.runs):
            shutil.rmtree(out)
            times["write alone"].append(
                timed(lambda: write_alone(Path(scratch) / "alone", sizes_bytes))
            )
            times["convert"].append(timed(lambda: convert(str(checkpoint), out, wanted)))
            times["read alone"].append(timed(lambda: read_alone(checkpoint, os.cpu_count() or 1)))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        print(f"{name:12} {medians[name]:7.2f} s ({min(seconds):.2f}-{max(seconds):.2f})")
    ratio = medians["convert"] / max(medians["read alone"], medians["write alone"])
    print(f"convert over the slower of the two: {ratio:.3f}")
    on_gpu = options.device.startswith("cuda")
    report = {
        "benchmark": "convert_gpu",
        "model": options.model,
        "layers": options.layers,
        "source": human_bytes(source_bytes),
        "pack": human_bytes(sum(sizes_bytes)),
        "device": torch.cuda.get_device_name() if on_gpu else options.device,
        "cpu_cores": os.cpu_count(),
        "seconds": times,
        "ratio": ratio,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
