"""How many rows a pass has time for, by real products."""

from __future__ import annotations

import torch

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
