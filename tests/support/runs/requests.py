"""Many requests of different kinds, and what each of them gives alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from layerpack.runtime import GenerateOptions, Model, OpenOptions

Requests = dict[int, tuple[str, GenerateOptions]]


def requests_of(count: int) -> Requests:
    """Every other one with a draft's trees, two of four sampled, one of three begins alike."""
    found: Requests = {}
    for number in range(count):
        options = GenerateOptions(
            max_new_tokens=4 + number % 9,
            temperature=0.9 if number % 4 < 2 else 0.0,
            top_k=20 * (number % 2),
            seed=number,
            draft_tokens=16 if number % 2 else 0,
            look_up=number % 5 == 0,
            prompt_lookup_tokens=4 if number % 5 == 0 else None,
        )
        begin = "something that many of these say, word by word, " if number % 3 == 0 else ""
        found[number] = (f"{begin}{number} and so on {'x' * (number * 7 % 40)}", options)
    return found


def alone(
    pack: Path, options: OpenOptions, requests: Mapping[int, tuple[str, GenerateOptions]]
) -> dict[int, tuple[int, ...]]:
    """The tokens of each, one after the other."""
    with Model.open(pack, options) as model:
        return {number: model.generate(*request).token_ids for number, request in requests.items()}


def slots_taken(model: Model) -> int:
    """How many slots somebody still has, when all that is kept of ended requests is given up."""
    scheduler = model._scheduler
    assert scheduler._pool is not None and model.rows is not None
    assert not scheduler._running
    scheduler._pool.clear()
    return model.rows.kv.num_slots - model.rows.kv.num_free
