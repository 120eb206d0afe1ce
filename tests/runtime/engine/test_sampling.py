"""A token is a function of its logits, the seed and the position; over seeds it is a fair draw."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.sampling import Sampler

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, 0.2]])
NUM_SEEDS = 4000


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
    ],
    ids=str,
)
def test_seeds_draw_from_the_filtered_softmax(how: dict[str, float]) -> None:
    """Pearson's chi-square; the bound is exceeded by a fair draw once in 100,000 times at most."""
    counts: Counter[int] = Counter()
    filtered = None
    for seed in range(NUM_SEEDS):
        sampler = Sampler(GenerateOptions(seed=seed, **how))  # type: ignore[arg-type]
        counts[sampler.chooser(LOGITS, seed % 7)(-1, 0)] += 1
        if filtered is None:
            filtered = LOGITS.clone()
            for one in sampler._filters:
                filtered = one(None, filtered)
    assert filtered is not None
    chances = filtered.softmax(-1)[0].tolist()
    assert all(counts[token] == 0 for token, chance in enumerate(chances) if chance == 0)
    wanted = {token: NUM_SEEDS * chance for token, chance in enumerate(chances) if chance > 0}
    chi_square = sum((counts[token] - count) ** 2 / count for token, count in wanted.items())
    free = len(wanted) - 1
    assert chi_square < free + 4.3 * math.sqrt(2 * free) + 12


def test_a_row_of_a_tree_draws_what_its_own_pass_would() -> None:
    logits = torch.randn((5, 50), generator=torch.Generator().manual_seed(1))
    sampler = Sampler(GenerateOptions(temperature=1.0, seed=9))
    many = sampler.chooser(logits, 100)
    for place in range(5):
        alone = sampler.chooser(logits[place : place + 1], 103)
        assert many(place - 1, 3) == alone(-1, 0)
    assert len({many(0, ahead) for ahead in range(40)}) > 5
