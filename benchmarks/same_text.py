"""Whether the text stays the same however tokens are proposed, over many prompts.

    python benchmarks/same_text.py PACK --draft DRAFT [--other-draft DRAFT] [--prompts 200]

Every prompt is generated from plainly, with each draft, with lookup, and with both; half of them
greedily, half sampled with a seed of their own. Counts texts that differ. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch

from layerpack.runtime import GenerateOptions, Model, OpenOptions

TEXT = """
the lighthouse keeper and her cat count numbers from one to ten while rain falls over a small town
where code is written in Python and proofs are found by reading them again
"""


def prompts(count: int) -> list[str]:
    """The same ones each time."""
    chance = random.Random(0)
    words = TEXT.split()
    return [
        f"{number}. Say something of {' '.join(chance.choices(words, k=chance.randrange(3, 30)))}"
        for number in range(count)
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--other-draft")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    texts: dict[str, list[tuple[int, ...]]] = {}
    passes: dict[str, int] = {}
    begin_s = time.perf_counter()
    for draft in filter(None, (options.draft, options.other_draft)):
        opened = OpenOptions(device=options.device, draft=draft, same_bits=True)
        with Model.open(options.pack, opened) as model:
            for number, prompt in enumerate(prompts(options.prompts)):
                plain = GenerateOptions(
                    max_new_tokens=options.tokens,
                    temperature=0.8 * (number % 2),
                    seed=number,
                    draft_tokens=0,
                    look_up=False,
                )
                for name, how in {
                    "plain": plain,
                    "lookup": replace(plain, prompt_lookup_tokens=8, look_up=True),
                    f"draft {draft}": replace(plain, draft_tokens=64),
                    f"draft {draft}, lookup": replace(
                        plain, draft_tokens=16, prompt_lookup_tokens=8, look_up=True
                    ),
                }.items():
                    if name in texts and len(texts[name]) == options.prompts:
                        continue  # those without a draft were run with the first one
                    found = model.generate(prompt, how)
                    texts.setdefault(name, []).append(found.token_ids)
                    passes[name] = passes.get(name, 0) + found.passes
    plain_texts = texts["plain"]
    result = {
        name: {
            "differ": sum(a != b for a, b in zip(plain_texts, found, strict=True)),
            "of": len(found),
            "tokens a pass": round(sum(map(len, found)) / passes[name], 2),
        }
        for name, found in texts.items()
    }
    for name, row in result.items():
        print(name, row)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    seconds = round(time.perf_counter() - begin_s, 1)
    print(json.dumps({"device": device, "seconds": seconds, "texts": result}))


if __name__ == "__main__":
    main()
