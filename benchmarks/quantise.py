"""The CPU quantiser against bitsandbytes' `quantize_4bit`, alternating in one run.

    python benchmarks/quantise.py [--rows 8192 --columns 8192 --runs 7 --device cpu]

Prints a table of millions of parameters per second (median, slowest and fastest run) and ends in
one line of JSON. Both results are compared first: a fast quantiser that differs is worth nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from layerpack.convert.nf4.quantize import Nf4Weight, quantize_nf4
from layerpack.formats.blob import nf4

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Speeds of one case, in millions of parameters per second."""

    dtype: str
    double_quant: bool
    ours_median: float
    ours_slowest: float
    ours_fastest: float
    bnb_median: float
    bnb_slowest: float
    bnb_fastest: float
    ratio_of_medians: float


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a warning of no use here
    device = torch.device(options.device)
    weight = torch.randn(options.rows, options.columns) * 0.02
    rows = [
        _measure(weight.to(dtype), name, double_quant, options.runs, device)
        for name, dtype in _DTYPES.items()
        for double_quant in (False, True)
    ]
    print(f"{'dtype':6}{'double':8}{'ours Mparam/s':>26}{'bitsandbytes Mparam/s':>26}{'ratio':>8}")
    for row in rows:
        ours = f"{row.ours_median:.0f} ({row.ours_slowest:.0f}-{row.ours_fastest:.0f})"
        bnb = f"{row.bnb_median:.0f} ({row.bnb_slowest:.0f}-{row.bnb_fastest:.0f})"
        print(f"{row.dtype:6}{row.double_quant!s:8}{ours:>26}{bnb:>26}{row.ratio_of_medians:8.1f}")
    report = {
        "benchmark": "quantise",
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "shape": list(weight.shape),
        "runs": options.runs,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(report))


def _measure(
    weight: torch.Tensor, dtype: str, double_quant: bool, runs: int, device: torch.device
) -> Row:
    import bitsandbytes.functional as bnb

    def ours() -> Nf4Weight:
        return quantize_nf4(weight, name="weight", double_quant=double_quant, device=device)

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        codes, state = bnb.quantize_4bit(
            weight.to(device), quant_type="nf4", compress_statistics=double_quant
        )
        return codes.cpu(), state.absmax.cpu()

    codes, absmax = theirs()
    result = ours()
    if not torch.equal(result.tensors[""], codes.view(-1)):
        raise SystemExit(f"{dtype}: codes differ from bitsandbytes'")
    if not double_quant and not torch.equal(result.tensors[nf4.ABSMAX], absmax):
        raise SystemExit(f"{dtype}: absmax differs from bitsandbytes'")
    mine, other = [], []
    for _ in range(runs):
        mine.append(_speed(ours, weight.numel()))
        other.append(_speed(theirs, weight.numel()))
    return Row(
        dtype=dtype,
        double_quant=double_quant,
        ours_median=statistics.median(mine),
        ours_slowest=min(mine),
        ours_fastest=max(mine),
        bnb_median=statistics.median(other),
        bnb_slowest=min(other),
        bnb_fastest=max(other),
        ratio_of_medians=statistics.median(mine) / statistics.median(other),
    )


def _speed(work: Callable[[], object], num_parameters: int) -> float:
    begin = time.perf_counter()
    work()
    return num_parameters / (time.perf_counter() - begin) / 1e6


if __name__ == "__main__":
    main()
