"""While requests wait, passes carry what they can: rows are left free where nothing fits."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from layerpack.runtime import GenerateOptions, Model, OpenOptions
from layerpack.runtime.network.row_network import RowNetwork
from layerpack.runtime.network.rows import Part

ROWS = 48


@pytest.mark.parametrize("kv_tokens", [400, 3000])
def test_passes_are_full_while_requests_wait(
    pack_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kv_tokens: int
) -> None:
    """At least 90 % of the rows that a waiting prompt could have had, and of all KV slots.

    With 400 slots requests wait for slots, with 3,000 mostly for rows.
    """
    monkeypatch.setattr("layerpack.runtime.requests.scheduler.PREFILL_TOKENS", ROWS)
    chance, usual = random.Random(3), RowNetwork.logits
    used_rows = free_rows = 0
    slots: list[float] = []
    options = OpenOptions(device="cpu", kv_tokens=kv_tokens)
    with Model.open(pack_of("llama"), options) as model:
        scheduler = model._scheduler

        def watched(network: RowNetwork, parts: Sequence[Part]) -> torch.Tensor:
            nonlocal used_rows, free_rows
            pool = scheduler._pool
            assert pool is not None
            used = sum(part.num_rows for part in parts)
            wanted = used + sum(running.num_missing for running in scheduler._running)
            if len(scheduler._queue):
                slots.append(1 - pool.num_spare / pool.num_slots)
                if pool.num_spare >= scheduler._queue.first.most:
                    wanted = ROWS  # who would fit was not let in
            if len(scheduler._queue) or wanted > ROWS:
                used_rows += used
                free_rows += min(ROWS, wanted)
            return usual(network, parts)

        monkeypatch.setattr(RowNetwork, "logits", watched)
        asked = [
            model.submit(
                f"{number} " + "".join(chance.choices("abcdefgh", k=chance.randrange(5, 55))),
                GenerateOptions(
                    max_new_tokens=chance.randrange(5, 30), raw=True, look_up=False, seed=number
                ),
            )
            for number in range(150)
        ]
        assert all(answer.wait().token_ids for answer in asked)
        used_slots = scheduler._pool is not None and sum(slots) / len(slots)
    assert used_rows >= 0.9 * free_rows
    assert used_slots >= 0.9
