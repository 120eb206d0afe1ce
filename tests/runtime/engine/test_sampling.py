"""A token is a function of its logits, the seed and the position; over seeds it is a fair draw."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.runs.rows import one_by_one

from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.sampling import Sampler, gumbel, penalised
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions

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
        counts[sampler.chooser(LOGITS, [0], [0] * (seed % 7), 0)(-1, 0)] += 1
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
    many = sampler.chooser(logits, [0] * 5, [0] * 100, 0)
    for place in range(5):
        alone = sampler.chooser(logits[place : place + 1], [0], [0] * 103, 0)
        assert many(place - 1, 3) == alone(-1, 0)
    assert len({many(0, ahead) for ahead in range(40)}) > 5


def test_penalties_are_those_of_transformers_and_of_openais_api() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    chance = torch.Generator().manual_seed(3)
    logits = torch.randn((1, 50), generator=chance)
    ids, prompt_tokens = [3, 9, 3, 7, 7, 7, 11], 3
    repeated = GenerateOptions(repetition_penalty=1.3)
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), logits.clone())
    assert torch.equal(penalised(logits, ids, prompt_tokens, repeated), wanted)
    counted = GenerateOptions(presence_penalty=0.5, frequency_penalty=-0.25)
    found = penalised(logits, ids, prompt_tokens, counted) - logits
    assert found[0, [3, 9, 7, 11, 0]].tolist() == pytest.approx(
        [0, 0, 3 * 0.25 - 0.5, 0.25 - 0.5, 0], abs=1e-6
    )


def test_log_probabilities_are_the_models_own(pack_of: Callable[..., Path]) -> None:
    how = GenerateOptions(
        max_new_tokens=6,
        temperature=0.7,
        seed=1,
        top_k=3,
        presence_penalty=1.0,
        top_logprobs=4,
        raw=True,
    )
    with Model.open(pack_of("llama"), OpenOptions(device="cpu")) as model:
        done = model.generate("hello", how)
        assert model.rows is not None
        ids = [*model.tokenizer("hello").input_ids, *done.token_ids]
        logits = one_by_one(model.rows, ids)[-7:-1]
    exact = logits.float().log_softmax(-1)
    for token, row in zip(done.tokens, exact, strict=True):
        assert token.logprob == float(row[token.id])
        best = row.topk(4)
        assert list(token.top) == list(
            zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )


def test_noise_is_splitmix64_and_gumbels() -> None:
    key, mask = -(3**39), (1 << 64) - 1

    def split_mix(number: int) -> float:
        state = (key + (number + 1) * 0x9E3779B97F4A7C15) & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        uniform = (((state ^ state >> 31) >> 12) + 0.5) / (1 << 52)
        return -math.log(-math.log(uniform))

    found = gumbel(key, 200_000, torch.device("cpu"))
    assert found[:500].tolist() == pytest.approx([split_mix(n) for n in range(500)], rel=1e-6)
    assert float(found.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(found.std()) == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    other = gumbel(key + 1, 200_000, torch.device("cpu"))
    assert abs(float(torch.corrcoef(torch.stack([found, other]))[0, 1])) < 0.01
