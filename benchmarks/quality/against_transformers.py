"""Whether `layerpack eval`'s loss and logits are transformers', over the same windows of a pack.

    python benchmarks/quality/against_transformers.py PACK [--text FILE] [--windows 8] [--decoded]

transformers loads the pack as the checkpoint that it is and gives each window's loss for labels
that leave out what is not scored. On CPUs with AVX512 bitsandbytes repacks weights and multiplies
with other numbers than those that it decodes; --decoded keeps that out. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import bitsandbytes
import torch
import transformers

from layerpack.formats.pack import Pack
from layerpack.runtime import Model, OpenOptions
from layerpack.runtime.quality.evaluate import evaluate, fitting
from layerpack.runtime.quality.windows import read_text, windows_of
from layerpack.runtime.tokenizer import load_tokenizer


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--decoded", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    pack = Pack.open(options.pack)
    windows = windows_of(
        read_text(options.text),
        load_tokenizer(options.pack),
        num_tokens=512,
        most=options.windows,
        where="the text",
    )
    how, at_a_time = fitting(pack, OpenOptions(device=options.device), windows)
    with Model.open(pack, how) as model:
        figures = evaluate(model, windows, at_a_time).scores.figures()
        logits = [model.logits(ids, len(ids[0])).cpu() for ids in windows.ids[:, None]]
    ours = math.log(figures["perplexity"].value)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        options.pack, device_map={"": options.device}
    )
    for module in theirs.modules():
        if options.decoded and isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    labels = windows.ids.clone()
    labels[:, : -windows.num_scored] = -100
    losses, num_equal = [], 0
    with torch.inference_mode():
        for ids, wanted, ours_here in zip(
            windows.ids[:, None], labels[:, None], logits, strict=True
        ):
            out = theirs(ids.to(options.device), labels=wanted.to(options.device))
            losses.append(float(out.loss))
            num_equal += torch.equal(out.logits.cpu(), ours_here)
    mean = sum(losses) / len(losses)
    print(
        json.dumps(
            {
                "pack": str(options.pack),
                "windows": len(windows),
                "loss": round(ours, 6),
                "transformers' loss": round(mean, 6),
                "relative difference": round(abs(ours / mean - 1), 7),
                "windows of equal logits": num_equal,
            }
        )
    )


if __name__ == "__main__":
    main()
