"""Peak memory of a process that converts a model's true shapes on the CPU.

    python benchmarks/convert_memory.py --work-dir /data/scratch [--model qwen2.5-72b --layers 2]

Every layer of a model is alike, so two of them peak as eighty do; the embedding and lm_head (2.5 GB
each for 72B) are there in full. Three figures, over the whole life of the child process: VmHWM, the
kernel's own high-water mark of all resident memory, shared libraries included (the bar's figure);
and, sampled every 5 ms, the most private memory (RssAnon) and the most of files mapped (RssFile).
The page cache is the system's, not the process's, and is in none of them. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from parts.make_checkpoint import make_checkpoint
from parts.shapes import SHAPES

from layerpack.formats.units import human_bytes

_SAMPLE_S = 0.005
_FIGURES = ("VmHWM", "RssAnon", "RssFile")
_CASES = {"default": [], "--head nf4": ["--head", "nf4"]}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, help="Where about 1.8 times its size is free.")
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen2.5-72b")
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "benchmark": "convert_memory",
        "model": options.model,
        "layers": options.layers,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
    }
    with tempfile.TemporaryDirectory(dir=options.work_dir, prefix="convert-memory-") as scratch:
        checkpoint, out = Path(scratch) / "checkpoint", Path(scratch) / "out"
        weights_bytes = make_checkpoint(options.model, checkpoint, num_layers=options.layers)
        print(f"{options.model}, {options.layers} layers: {human_bytes(weights_bytes)} in bf16")
        print(f"{'':12}" + "".join(f"{name:>12}" for name in _FIGURES) + f"{'seconds':>10}")
        for case, arguments in _CASES.items():
            begin_s = time.perf_counter()
            peaks = _peaks(["convert", str(checkpoint), str(out), "--device", "cpu", *arguments])
            seconds = time.perf_counter() - begin_s
            shutil.rmtree(out)
            cells = "".join(f"{human_bytes(peaks[name]):>12}" for name in _FIGURES)
            print(f"{case:12}{cells}{seconds:10.0f}")
            report[case] = {"peak_bytes": peaks, "seconds": seconds}
    print(json.dumps(report))


def _peaks(arguments: list[str]) -> dict[str, int]:
    """Run the command line in a process; the largest value of each figure, in bytes."""
    command = [sys.executable, "-m", "layerpack.cli.main", *arguments]
    peaks = dict.fromkeys(_FIGURES, 0)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", status.read_text(), re.MULTILINE):
                if name in peaks:
                    peaks[name] = max(peaks[name], int(kib) * 1024)
            time.sleep(_SAMPLE_S)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return peaks


if __name__ == "__main__":
    main()
