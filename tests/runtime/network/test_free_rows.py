"""How many rows a pass has time for, by real products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.runs.rows import one_by_one, unequal_seeds

from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.product import least_rows as module
from layerpack.runtime.product.free_rows import COUNTS, free_rows
from layerpack.runtime.product.ways import ONE_BY_ONE, pick_product

CPU, SHAPE = torch.device("cpu"), (256, 512)


def test_the_slower_the_weights_the_more_rows() -> None:
    way = pick_product(CPU, torch.bfloat16, [SHAPE])
    found = [
        free_rows(
            way,
            SHAPE,
            num_parameters=100 * SHAPE[0] * SHAPE[1],
            device=CPU,
            dtype=torch.bfloat16,
            pass_s=pass_s,
        )
        for pass_s in (0.0, 60.0)
    ]
    assert found[0] <= found[1] == max(COUNTS)


def test_rows_that_cost_most_of_a_pass_are_not_free() -> None:
    found = free_rows(
        ONE_BY_ONE,
        SHAPE,
        num_parameters=100_000 * SHAPE[0] * SHAPE[1],
        device=CPU,
        dtype=torch.bfloat16,
        pass_s=0.01,
    )
    assert found == min(COUNTS)


@pytest.mark.parametrize("seldom", [False, True], ids=["most rows", "a row in a hundred"])
def test_means_that_depend_on_the_number_of_rows_are_found_out(*, seldom: bool) -> None:
    """A device that sums few rows up in another order, as CUDA does; few bits tell."""
    usual = torch.Tensor.mean

    def mean(rows: torch.Tensor, dim: int) -> torch.Tensor:
        if rows.shape[0] >= 16:
            return usual(rows, dim)
        other = (usual(rows[:, ::2], dim) + usual(rows[:, 1::2], dim)) / 2
        return torch.where(rows[:, 0] > 6.6, other, usual(rows, dim)) if seldom else other

    module._least.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "mean", mean)
            assert module.least_rows(CPU, [576]) == 16
    finally:
        module._least.cache_clear()


def test_passes_filled_up_have_the_same_bits(pack_of: Callable[..., Path]) -> None:
    ids = [n * 7 % 90 for n in range(40)]
    with Model.open(pack_of("llama"), OpenOptions(device="cpu")) as model:
        assert model.rows is not None
        alone = one_by_one(model.rows, ids)
        model.rows._least_rows = 16
        assert torch.equal(one_by_one(model.rows, ids), alone)
        assert unequal_seeds(model.rows, ids, range(3)) == []
