"""Requests share passes: each one's text is that of `generate` alone, whoever else is there."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.runs.requests import alone, requests_of, slots_taken

from layerpack.convert.api import convert
from layerpack.formats.errors import PromptError, StreamError
from layerpack.runtime import GenerateOptions, Model, OpenOptions
from layerpack.runtime.network.row_network import RowNetwork
from layerpack.runtime.requests.answer import Answer

PackOf = Callable[..., Path]
ON_CPU = OpenOptions(device="cpu")
SYSTEM = "You answer in few words and never say anything that nobody asked for. " * 2


@pytest.mark.parametrize(("name", "count", "kv_tokens"), [("llama", 96, None), ("gemma3", 24, 300)])
def test_texts_are_those_of_a_request_alone(
    pack_of: PackOf, name: str, count: int, kv_tokens: int | None
) -> None:
    """Some with a draft's trees, some sampled, some with a long beginning in common."""
    pack, requests = pack_of(name), requests_of(count)
    options = replace(ON_CPU, draft=str(pack), kv_tokens=kv_tokens)
    wanted = alone(pack, options, requests)
    chance, answers = random.Random(1), dict[int, Answer]()
    with Model.open(pack, options) as model:

        def ask(numbers: list[int]) -> None:
            for number in numbers:
                time.sleep(chance.random() * 0.05)
                answers[number] = model.submit(*requests[number])

        order = list(requests)
        chance.shuffle(order)
        threads = [threading.Thread(target=ask, args=(order[part::3],)) for part in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = {number: answer.wait().token_ids for number, answer in answers.items()}
        assert found == wanted
        counts = model.counts
        assert counts.passes < sum(map(len, wanted.values()))
        assert slots_taken(model) == 0
    assert counts.cached_tokens > 0


def test_a_beginning_in_common_is_computed_once(pack_of: PackOf) -> None:
    with Model.open(pack_of("llama"), ON_CPU) as model:
        asked = GenerateOptions(max_new_tokens=3, system=SYSTEM)
        answers = [model.submit(f"number {number}", asked) for number in range(8)]
        done = [answer.wait() for answer in answers]
    assert done[0].cached_tokens == 0
    assert all(len(SYSTEM) < one.cached_tokens < one.prompt_tokens for one in done[1:])


def test_a_conversation_goes_on_from_its_keys_and_values(pack_of: PackOf) -> None:
    with Model.open(pack_of("llama"), ON_CPU) as model:
        how = GenerateOptions(max_new_tokens=20, raw=True)
        first = model.generate("hello there, how are you?", how)
        more = model.generate("hello there, how are you? And then?", how)
    assert more.cached_tokens >= len("hello there, how are you?"), (first, more)


def test_who_does_not_fit_waits_and_is_told_its_place(pack_of: PackOf) -> None:
    options = replace(ON_CPU, kv_tokens=80)
    with Model.open(pack_of("llama"), options) as model, held_passes() as go:
        how = GenerateOptions(max_new_tokens=40, raw=True)
        answers = [model.submit(f"{number} hello", how) for number in range(4)]
        wait_until(lambda: [answer.place for answer in answers] == [0, 1, 2, 3])
        go.set()
        assert all(len(answer.wait().token_ids) for answer in answers)


def test_who_leaves_frees_its_slots_within_a_pass(pack_of: PackOf) -> None:
    with Model.open(pack_of("llama"), ON_CPU) as model:
        how = GenerateOptions(max_new_tokens=1000, raw=True)
        staying, leaving, waiting = (model.submit("a" * count, how) for count in (9, 8, 7))
        for answer in (staying, leaving):
            next(answer.pieces())
        passes, waited = model.counts.passes, waiting.place
        leaving.cancel()
        waiting.cancel()
        assert leaving.wait().finish == waiting.wait().finish == "interrupted"
        assert waited or not waiting.wait().token_ids or waiting.wait().passes
        assert model.counts.passes <= passes + 3
        assert not staying.is_over
        staying.cancel()
        assert staying.wait().finish == "interrupted"
        assert model.generate("next", replace(how, max_new_tokens=2)).finish == "length"
        assert slots_taken(model) == 0


def test_a_pass_that_fails_fails_those_in_it_and_no_others(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, failures = RowNetwork.logits, iter([False, False, True])

    def fail(*arguments: object) -> torch.Tensor:
        if next(failures, False):
            raise StreamError("the disk is gone")
        return usual(*arguments)  # type: ignore[arg-type]

    with Model.open(pack_of("llama"), replace(ON_CPU, kv_tokens=30)) as model:
        how = GenerateOptions(max_new_tokens=10, raw=True)
        wanted = model.generate("later", how).token_ids
        monkeypatch.setattr(RowNetwork, "logits", fail)
        first, second, later = (model.submit(text, how) for text in ("one", "other", "later"))
        for answer in (first, second):
            with pytest.raises(StreamError, match="the disk is gone"):
                answer.wait()
        assert later.wait().token_ids == wanted
        assert model.generate("later", how).token_ids == wanted
        assert slots_taken(model) == 0


def test_what_is_wrong_with_one_is_no_matter_to_others(pack_of: PackOf) -> None:
    with Model.open(pack_of("llama"), ON_CPU) as model:
        good, bad = model.submit("hello"), model.submit("   ")
        with pytest.raises(PromptError, match="empty"):
            bad.wait()
        assert good.wait().finish in ("length", "stop")


def test_coroutines_take_pieces(pack_of: PackOf) -> None:
    async def text_of(model: Model, prompt: str) -> str:
        return "".join([piece async for piece in model.submit(prompt, how)])

    async def all_of(model: Model) -> list[str]:
        return await asyncio.gather(*(text_of(model, f"number {n}") for n in range(6)))

    how = GenerateOptions(max_new_tokens=12)
    with Model.open(pack_of("llama"), ON_CPU) as model:
        found = asyncio.run(all_of(model))
        assert found == [model.generate(f"number {n}", how).text for n in range(6)]

        async def refused() -> None:
            async for _ in model.submit(""):
                pytest.fail("an empty prompt has no text")

        with pytest.raises(PromptError):
            asyncio.run(refused())


def test_closing_ends_all(pack_of: PackOf) -> None:
    with Model.open(pack_of("llama"), replace(ON_CPU, kv_tokens=500)) as model:
        how = GenerateOptions(max_new_tokens=400, raw=True)
        running, *waiting = (model.submit(f"{number}", how) for number in range(5))
        next(running.pieces())
    assert running.wait().finish == "interrupted"
    for answer in waiting:
        with pytest.raises(StreamError, match="closed"):
            answer.wait()
    with pytest.raises(StreamError, match="closed"):
        model.submit("too late")


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_prompt_in_pieces_whose_length_turns_it(
    checkpoint_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It went in from its beginning again and again."""
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    shape: dict[str, object] = {"max_position_embeddings": 40}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0, 3.0, 5.0, 8.0] * 2}
        rope["original_max_position_embeddings"] = 40
        shape = {"max_position_embeddings": 160, "original_max_position_embeddings": 40}
    name = "phi3" if kind == "longrope" else "llama"
    source = checkpoint_of(name, rope_parameters=rope, **shape)
    convert(str(source), tmp_path / "pack")
    how = GenerateOptions(max_new_tokens=12, raw=True)
    texts = []
    for most in (2048, 16):
        monkeypatch.setattr("layerpack.runtime.requests.scheduler.PREFILL_TOKENS", most)
        with Model.open(tmp_path / "pack", ON_CPU) as model:
            answers = [model.submit("abcd efgh " * count, how) for count in (6, 3, 7)]
            texts.append([answer.wait().token_ids for answer in answers])
    assert texts[0] == texts[1]


@contextmanager
def held_passes() -> Iterator[threading.Event]:
    """The first pass waits until the event is set."""
    go, usual = threading.Event(), RowNetwork.logits

    def held(*arguments: object) -> torch.Tensor:
        assert go.wait(30)
        return usual(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowNetwork, "logits", held)
        try:
            yield go
        finally:
            go.set()


def wait_until(so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
