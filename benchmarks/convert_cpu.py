"""A whole conversion on the CPU against transformers + bitsandbytes loading the same checkpoint.

    python benchmarks/convert_cpu.py --work-dir /data/scratch [--model mistral-7b --layers 8]

Each run is a process of its own, the two sides by turns, the checkpoint in the page cache. Timed is
the one call, after the imports: `convert(...)`, which reads the checkpoint, takes its digest,
quantises, and writes a pack that is on the disk (fsync) when it returns; and
`AutoModelForCausalLM.from_pretrained(..., BitsAndBytesConfig)`, which reads, quantises, and keeps
the result in memory. The whole process, imports included, is given beside it. Parameters are all of
the model's, the embedding and lm_head (16 bits on both sides) among them. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from parts.make_checkpoint import make_checkpoint
from parts.shapes import SHAPES

from layerpack.formats.units import human_bytes

_OURS = """
import json, sys, time
import torch, transformers
from layerpack.convert.api import convert
from layerpack.convert.options import ConvertOptions
begin = time.perf_counter()
manifest = convert(sys.argv[1], sys.argv[2], ConvertOptions(device="cpu"))
print(json.dumps([time.perf_counter() - begin, manifest.model.num_parameters]))
"""
_THEIRS = """
import json, logging, sys, time
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
import torch, transformers, bitsandbytes
transformers.utils.logging.disable_progress_bar()
begin = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1],
    device_map={"": "cpu"},
    dtype=torch.bfloat16,
    quantization_config=transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
)
seconds = time.perf_counter() - begin
layer = next(m for m in model.modules() if type(m).__name__ == "Linear4bit")
assert layer.weight.dtype == torch.uint8, "not quantised"
print(json.dumps([seconds, None]))
"""


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, help="Where about 1.5 times its size is free.")
    parser.add_argument("--model", choices=sorted(SHAPES), default="mistral-7b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work_dir, prefix="convert-cpu-") as scratch:
        checkpoint, out = Path(scratch) / "checkpoint", Path(scratch) / "out"
        weights_bytes = make_checkpoint(options.model, checkpoint, num_layers=options.layers)
        num_parameters = 0
        calls: dict[str, list[float]] = {"ours": [], "theirs": []}
        processes: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(options.runs):
            for side, script in (("ours", _OURS), ("theirs", _THEIRS)):
                warm(checkpoint)
                begin_s = time.perf_counter()
                seconds, count = run_child(script, checkpoint, out)
                processes[side].append(time.perf_counter() - begin_s)
                calls[side].append(seconds)
                num_parameters = count or num_parameters
                shutil.rmtree(out, ignore_errors=True)
    print(f"{options.model}, {options.layers} layers: {human_bytes(weights_bytes)} in bf16")
    print(f"{'':22}{'layerpack':>24}{'transformers + bnb':>24}{'ratio':>8}")
    report: dict[str, Any] = {
        "benchmark": "convert_cpu",
        "model": options.model,
        "layers": options.layers,
        "parameters": num_parameters,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
    }
    for name, times in (("call", calls), ("process", processes)):
        speeds = {side: [num_parameters / s / 1e6 for s in times[side]] for side in times}
        medians = {side: statistics.median(speeds[side]) for side in speeds}
        ratio = medians["ours"] / medians["theirs"]
        cells = [
            f"{medians[side]:.0f} ({min(speeds[side]):.0f}-{max(speeds[side]):.0f})"
            for side in ("ours", "theirs")
        ]
        print(f"{name + ', Mparam/s':22}{cells[0]:>24}{cells[1]:>24}{ratio:8.2f}")
        report[name] = {"seconds": times, "medians_mparam_s": medians, "ratio": ratio}
    print(json.dumps(report))


def warm(checkpoint: Path) -> None:
    """Bring every shard into the page cache."""
    for file in checkpoint.glob("*.safetensors"):
        with open(file, "rb", buffering=0) as opened:
            while opened.read(1 << 26):
                pass


def run_child(script: str, *arguments: Path) -> list[Any]:
    """What a Python process prints as its last line."""
    child = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    result: list[Any] = json.loads(child.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
