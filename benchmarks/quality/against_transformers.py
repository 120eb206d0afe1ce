"""Whether `layerpack eval`'s loss is transformers' own, over the same windows of the same pack.

    python benchmarks/quality/against_transformers.py PACK [--text FILE] [--windows 8]

transformers loads the pack as the checkpoint that it is and gives each window's loss for labels
that leave out what is not scored. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

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
    ours = math.log(figures["perplexity"].value)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        options.pack, device_map={"": options.device}
    )
    labels = windows.ids.clone()
    labels[:, : -windows.num_scored] = -100
    losses = []
    with torch.inference_mode():
        for ids, wanted in zip(windows.ids[:, None], labels[:, None], strict=True):
            out = theirs(ids.to(options.device), labels=wanted.to(options.device))
            losses.append(float(out.loss))
    mean = sum(losses) / len(losses)
    print(
        json.dumps(
            {
                "pack": str(options.pack),
                "windows": len(windows),
                "loss": round(ours, 6),
                "transformers' loss": round(mean, 6),
                "relative difference": round(abs(ours / mean - 1), 7),
            }
        )
    )


if __name__ == "__main__":
    main()
