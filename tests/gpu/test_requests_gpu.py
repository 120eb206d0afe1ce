"""On a GPU, too, an answer is the same alone and among 95 others."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs.requests import alone, requests_of, slots_taken

from layerpack.runtime import Limits, Model, OpenOptions
from layerpack.runtime.requests.answer import Answer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tier", ["vram", "host"])
def test_96_answers_are_those_of_requests_alone(pack_of: Callable[..., Path], tier: str) -> None:
    pack, requests = pack_of("llama"), requests_of(96)
    options = OpenOptions(
        device="cuda",
        limits=Limits(vram_slices=0) if tier == "host" else Limits(),
        draft=str(pack),
        kv_tokens=4000,
        context_tokens=400,
        proposed_tokens=16,
        same_bits=True,
    )
    wanted = alone(pack, options, requests)
    chance, answers = random.Random(1), dict[int, Answer]()
    with Model.open(pack, options) as model:

        def ask(numbers: list[int]) -> None:
            for number in numbers:
                time.sleep(chance.random() * 0.02)
                answers[number] = model.submit(*requests[number])

        threads = [
            threading.Thread(target=ask, args=(list(requests)[part::4],)) for part in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {number: one.wait().token_ids for number, one in answers.items()} == wanted
        assert slots_taken(model) == 0
