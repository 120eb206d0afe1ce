"""Standard errors are how far figures of other texts lie: shown by drawing many."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerpack.runtime.quality.figures import Figure, exponential, mean, quantile, share
from layerpack.runtime.quality.scores import Scores

KINDS: dict[str, Callable[[torch.Tensor], Figure]] = {
    "mean": mean,
    "perplexity": lambda values: exponential(mean(values)),
    "median": lambda values: quantile(values, 0.5),
    "99th percentile": lambda values: quantile(values, 0.99),
    "share": lambda values: share(values > 0.7),
}


@pytest.mark.parametrize("name", KINDS)
def test_errors_are_those_of_many_draws(name: str) -> None:
    chance = torch.Generator().manual_seed(1)
    drawn = torch.empty(400, 1000).exponential_(1.0, generator=chance)
    found = [KINDS[name](values) for values in drawn]
    values = torch.tensor([one.value for one in found], dtype=torch.float64)
    errors = torch.tensor([one.standard_error for one in found], dtype=torch.float64)
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.15)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_figures_of_few_values_are_figures(values: list[float]) -> None:
    given_values = torch.tensor(values, dtype=torch.float64)
    assert min(values) <= quantile(given_values, 0.99).value <= max(values) + 1e-6
    assert mean(given_values).value == pytest.approx(sum(values) / len(values), abs=1e-4)
    assert 0 <= share(given_values > 1).value <= 1
    if len(values) == 1:
        assert math.isnan(mean(given_values).standard_error)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_scores_in_pieces_are_scores_of_all(rows: int) -> None:
    torch.manual_seed(rows)
    logits, true = torch.randn(2, rows, 50).bfloat16()
    tokens = torch.randint(50, (rows,))
    scores = Scores()
    scores.add(logits, tokens, true)
    ours, theirs = logits.double().log_softmax(-1), true.double().log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    torch.testing.assert_close(torch.cat(scores.divergences), divergence.float())
    losses = -ours[torch.arange(rows), tokens]
    torch.testing.assert_close(torch.cat(scores.losses), losses.float())
    assert scores.num_tokens == rows
