"""The server, asked by OpenAI's own client and by raw HTTP."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from support.runs.served import Served, post, served

from layerpack.runtime import GenerateOptions

PackOf = Callable[..., Path]
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def test_a_chat_is_what_generate_says(server: Served, client: openai.OpenAI) -> None:
    how = GenerateOptions(max_new_tokens=12)
    wanted = server.model.generate("hello", how)
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=12, temperature=0
    )
    (choice,) = found.choices
    assert choice.message.content == wanted.text and choice.finish_reason == wanted.finish
    assert found.usage is not None
    assert found.usage.completion_tokens == len(wanted.token_ids)
    assert found.usage.prompt_tokens == wanted.prompt_tokens
    assert found.model_extra is not None and found.model_extra["timings"]["passes"] >= 1
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_stream_is_the_same_text(server: Served, client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"max_tokens": 14, "temperature": 0.8, "seed": 5, "n": 2}
    whole = client.chat.completions.create(model="tiny", messages=HELLO, **how)
    texts, finishes, usage = ["", ""], {}, None
    for chunk in client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}, **how
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_completions_stop_logprobs(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="tiny", prompt=["one", "two"], max_tokens=10, temperature=0, logprobs=2
    )
    assert len(whole.choices) == 2
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == 10 == len(logprobs.token_logprobs)
    text = whole.choices[0].text
    assert len(text) > 4
    stop = text[2:4]
    stopped = client.completions.create(
        model="tiny", prompt="one", max_tokens=10, temperature=0, stop=[stop]
    )
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content and len(content) == 3 and len(content[0].top_logprobs) == 3


def test_the_async_client(server: Served) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
            found = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="tiny",
                        messages=[{"role": "user", "content": f"number {n}"}],
                        max_tokens=8,
                        temperature=0,
                    )
                    for n in range(10)
                )
            )
            return [one.choices[0].message.content for one in found]

    how = GenerateOptions(max_new_tokens=8)
    wanted = [server.model.generate(f"number {n}", how).text for n in range(10)]
    assert asyncio.run(ask()) == wanted


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": HELLO, "grammar": "x"}, 400, "grammar"),
        ({"messages": HELLO, "temperature": float("1e400")}, 400, None),
        ({"messages": HELLO, "temperature": -1}, 400, "temperature"),
        ({"messages": HELLO, "n": 0}, 400, "n"),
        ({"messages": HELLO, "stop": [""]}, 400, "stop"),
        ({"messages": HELLO, "logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"messages": HELLO, "tool_choice": "required"}, 400, "tool_choice"),
        ({"messages": HELLO, "max_tokens": 1.5}, 400, "max_tokens"),
        ({"messages": HELLO, "model": "gpt-4"}, 404, "model"),
        ({"messages": [{"role": "king", "content": "a"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "messages"),
        ({"messages": HELLO, "stream_options": {}}, 400, "stream_options"),
        ([1], 400, None),
        (b"{", 400, None),
        (b"[" * 5000, 400, None),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(
    server: Served, body: Any, status: int, param: str | None
) -> None:
    found, said = post(server, "/v1/chat/completions", body)
    assert (found, said["error"]["param"]) == (status, param), said
    assert said["error"]["message"]


def test_what_was_answered_can_be_sent_back(client: openai.OpenAI) -> None:
    """With all its fields, null ones too, as `model_dump` gives them."""
    messages: list[Any] = [*HELLO]
    for turn in range(3):
        told = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
        said = told.choices[0].message.model_dump()
        assert None in said.values()
        nulls = {"annotations": None, "audio": None, "function_call": None, "name": None}
        messages += [said | nulls, {"role": "user", "content": f"and {turn}?", "name": None}]
    client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=1, extra_body={"suffix": None, "unknown": None}
    )


def test_a_stream_that_cannot_begin_is_an_error_of_http(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x" * 5000}], stream=True
        )


def test_elsewhere(server: Served) -> None:
    assert post(server, "/v1/embeddings", {})[0] == 404
    assert post(server, "/health", {})[0] == 405


def test_a_key_and_bounds(pack_of: PackOf) -> None:
    with served(pack_of("llama"), api_key="sésame", max_body_bytes=2000) as server:
        ask = {"messages": HELLO, "max_tokens": 2}
        key = "Bearer sésame".encode().decode("latin-1")
        assert post(server, "/v1/chat/completions", ask)[0] == 401
        assert post(server, "/v1/chat/completions", ask, authorization="Bearer x")[0] == 401
        assert post(server, "/v1/chat/completions", ask, authorization=key)[0] == 200
        assert post(server, "/v1/completions", {"prompt": "x" * 3000}, authorization=key)[0] == 413


def test_metrics_and_health(server: Served) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.request("GET", "/health")
    health = json.loads(connection.getresponse().read())
    connection.close()
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(found["layerpack_passes_total"]) >= 0
    assert float(found["layerpack_kv_slots"]) >= float(found["layerpack_kv_slots_free"])
    assert health["status"] == "ok"
