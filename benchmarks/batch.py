"""Tokens a second of many answers at a time over those of one, in one run.

    python benchmarks/batch.py /data/random-72b --vram 8GiB [--counts 1,16,96]

Every answer has 64 tokens behind a prompt of 64 of its own; all are asked for at once. The time is
that of everything, prompts included. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from layerpack.cli.options.sizes import parse_size
from layerpack.formats.units import GIB
from layerpack.runtime import GenerateOptions, Limits, Model, OpenOptions


def measure(model: Model, count: int, *, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    """Of so many answers at a time."""
    before = model.counts.passes, model.counts.rows, model.counts.pass_s
    begin_s = time.perf_counter()
    how = GenerateOptions(max_new_tokens=tokens, raw=True, look_up=False)
    answers = [model.submit(f"{number:03} " * (prompt_tokens // 4), how) for number in range(count)]
    done = [answer.wait() for answer in answers]
    seconds = time.perf_counter() - begin_s
    given = sum(len(one.token_ids) for one in done)
    passes = model.counts.passes - before[0]
    return {
        "answers": count,
        "tokens": given,
        "seconds": round(seconds, 2),
        "tokens/s": round(given / seconds, 2),
        "passes": passes,
        "seconds a pass": round((model.counts.pass_s - before[2]) / passes, 4),
        "peak VRAM GiB": round(max(one.peak_vram_bytes for one in done) / GIB, 2),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--vram", default="8GiB")
    parser.add_argument("--counts", default="1,16,96")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    counts = [int(text) for text in options.counts.split(",")]
    each = options.prompt_tokens + options.tokens
    how = OpenOptions(
        device=options.device,
        limits=Limits(vram_bytes=parse_size(options.vram)),
        context_tokens=each,
        kv_tokens=each * max(counts),
        same_bits=True,
    )
    with Model.open(options.pack, how) as model:
        measure(model, 1, prompt_tokens=8, tokens=2)  # warms up
        found = []
        for count in counts:
            found.append(
                measure(model, count, prompt_tokens=options.prompt_tokens, tokens=options.tokens)
            )
            ratio = found[-1]["tokens/s"] / found[0]["tokens/s"]
            print(f"{found[-1]}, over {counts[0]}: {ratio:.2f}", flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"device": device, "found": found}))


if __name__ == "__main__":
    main()
