"""Tokens a pass that a draft's trees give, for real models: chain, trees, lookup; greedy, sampled.

    python benchmarks/acceptance.py PACK --draft DRAFT [--tokens 96]

The text of each prompt is generated plainly once; then the proposals for every pass are made as
`generate` makes them and held against that text, which any way of proposing would give to the bit.
Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from layerpack.runtime import GenerateOptions, Model, OpenOptions
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.engine.prompt import encode_prompt
from layerpack.runtime.engine.proposers import (
    DraftProposer,
    LookupProposer,
    Proposer,
    TreeShape,
    shape_of,
)
from layerpack.runtime.engine.sampling import Sampler
from layerpack.runtime.engine.sequence import RowSequence
from layerpack.runtime.engine.tree import follow

PROMPTS = {
    "prose": (
        "Explain why the sky is blue to a ten-year-old, in about 150 words.",
        "What are the main causes of the French Revolution? Answer in a short essay.",
        "Summarise the plot of Romeo and Juliet in six sentences.",
    ),
    "code": (
        "Fix the bug: def mean(xs): return sum(xs)/len(x). Then write unit tests with pytest.",
        "Write a Python function that parses an ISO 8601 date string without libraries.",
        "Write a SQL query that lists the five customers with the highest total order value.",
    ),
}
CHAIN = TreeShape(nodes=16, levels=16, beams=1)
LOOKUP, _MOST_NODES = 8, 1000
WAYS: dict[str, tuple[TreeShape | None, int]] = {
    "chain of 16": (CHAIN, 0),
    "tree of 64": (shape_of(64), 0),
    "tree of 64, lookup": (shape_of(64), LOOKUP),
    "tree of 256": (shape_of(255), 0),
    "lookup": (None, LOOKUP),
}
SAMPLED = "tree of 64"


def passes_for(proposer: Proposer, prompt: Sequence[int], text: Sequence[int]) -> int:
    """How many passes give the text behind the prompt."""
    ids, passes = [*prompt, text[0]], 1  # the prompt's own pass gives the first token
    while len(ids) < len(prompt) + len(text):
        rest = text[len(ids) - len(prompt) :]
        tree = proposer.propose(ids, len(rest) - 1, _MOST_NODES)

        def choose(place: int, ahead: int, rest: Sequence[int] = rest) -> int:
            return rest[ahead] if ahead < len(rest) else -1

        new, right = follow(tree, choose)
        proposer.accepted(right)
        ids += new[: len(rest)]
        passes += 1
    return passes


def measure(
    model: Model, tokens: int, ways: Sequence[str], say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Tokens a pass by way, decoding and kind of prompt; the prompt's own pass left out."""
    assert model.draft is not None and model.rows is not None
    found: dict[str, dict[str, float]] = {}
    for temperature in (0.0, 0.7):
        for kind, prompts in PROMPTS.items():
            texts = []
            for number, prompt in enumerate(prompts):
                how = GenerateOptions(
                    max_new_tokens=tokens,
                    temperature=temperature,
                    seed=number,
                    draft_tokens=0,
                    look_up=False,
                )
                rows = model.network.get_input_embeddings().num_embeddings
                ids = encode_prompt(model.tokenizer, prompt, how, embedding_rows=rows)
                texts.append((ids, model.generate(prompt, how).token_ids, Sampler(how)))
            for way in ways:
                if temperature and way != SAMPLED:
                    continue
                shape, lookup = WAYS[way]
                begin_s, passes, count = time.perf_counter(), 0, 0
                for ids, text, sampler in texts:
                    nodes = 0 if shape is None else shape.levels * shape.beams
                    with RowSequence.opened(
                        model.draft.rows,
                        max_tokens=len(ids) + len(text) + 1,
                        max_nodes=nodes,
                        patience=Patience(),
                    ) as sequence:
                        proposer: Proposer | None = None
                        if shape is not None:
                            proposer = DraftProposer(sequence, sampler, shape)
                        if lookup:
                            proposer = LookupProposer(lookup, proposer)
                        assert proposer is not None
                        passes += passes_for(proposer, ids, text) - 1
                        count += len(text) - 1
                name = "greedy" if not temperature else f"temperature {temperature}"
                found.setdefault(f"{name}, {way}", {})[kind] = round(count / passes, 2)
                seconds = time.perf_counter() - begin_s
                say(f"{name}, {way}, {kind}: {count / passes:.2f} tokens a pass ({seconds:.0f} s)")
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", default="", help=f"of {'; '.join(WAYS)}")
    options = parser.parse_args()
    chosen = options.only.split("; ") if options.only else WAYS
    ways = [way for way in WAYS if way in chosen]
    opened = OpenOptions(device=options.device, draft=options.draft, same_bits=True)
    with Model.open(options.pack, opened) as model:
        found = measure(model, options.tokens, ways, lambda text: print(text, flush=True))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
