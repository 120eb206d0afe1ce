"""The server under load: clients that leave, passes that fail, bodies of any kind, its end."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.runs.bodies import bodies
from support.runs.requests import slots_taken
from support.runs.served import Served, post, served

from layerpack.formats.errors import StreamError
from layerpack.runtime import GenerateOptions
from layerpack.runtime.network.row_network import RowNetwork

PackOf = Callable[..., Path]
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def test_a_full_queue_sends_away(pack_of: PackOf) -> None:
    with served(pack_of("llama"), kv_tokens=1600, max_waiting=1) as server:
        ask = {"messages": HELLO, "max_tokens": 1400, "temperature": 0}
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: post(server, "/v1/chat/completions", ask)[0], range(4)))
    assert set(found) <= {200, 429} and 200 in found and 429 in found


def test_who_leaves_is_gone_within_a_pass(server: Served) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for stream in (True, False):
        body = json.dumps({"messages": HELLO, "max_tokens": 1400, "stream": stream}).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}"
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_until(lambda: server.model.counts.running == 1)
        wait_until(lambda: server.model.counts.running == 0, within_s=3)
    assert slots_taken(server.model) == 0


def test_a_pass_that_fails_is_told_and_others_go_on(
    server: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, failures = RowNetwork.logits, iter([False, True])

    def fail(*arguments: object) -> torch.Tensor:
        if next(failures, False):
            raise StreamError("the disk is gone")
        return usual(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(RowNetwork, "logits", fail)
        with pytest.raises(openai.InternalServerError, match="the disk is gone"):
            client.chat.completions.create(model="tiny", messages=HELLO)
        failures = iter([False, True])
        with pytest.raises(openai.APIError, match="the disk is gone"):
            for _ in client.chat.completions.create(model="tiny", messages=HELLO, stream=True):
                pass
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2).choices


def test_many_clients_some_of_whom_leave(pack_of: PackOf) -> None:
    """64 at a time; every complete answer is right, and nothing is left over."""
    chance = random.Random(2)
    with served(pack_of("llama"), kv_tokens=2500) as server:
        how = GenerateOptions(max_new_tokens=6)
        wanted = {n: server.model.generate(f"number {n % 20}", how).text for n in range(20)}
        before = threading.active_count()
        kinds = [chance.choice(["whole", "whole", "stream", "leaves", "bad"]) for _ in range(120)]

        def ask(number: int) -> str | None:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
            kind = kinds[number]
            said: dict[str, Any] = {
                "model": "tiny",
                "messages": [{"role": "user", "content": f"number {number % 20}"}],
                "max_tokens": 6,
                "temperature": 0,
            }
            if kind == "bad":
                with pytest.raises(openai.BadRequestError):
                    client.chat.completions.create(**said, extra_body={"wrong": 1})
                return None
            if kind == "leaves":
                stream = client.chat.completions.create(**said | {"max_tokens": 300}, stream=True)
                next(iter(stream))
                stream.close()
                return None
            if kind == "stream":
                chunks = client.chat.completions.create(**said, stream=True)
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            return str(client.chat.completions.create(**said).choices[0].message.content)

        with ThreadPoolExecutor(64) as pool:
            found = list(pool.map(ask, range(len(kinds))))
        assert all(text in (None, wanted[n % 20]) for n, text in enumerate(found))
        wait_until(lambda: not server.model.counts.running)
        assert slots_taken(server.model) == 0
        assert threading.active_count() <= before + 1


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
    bodies(4),
    st.booleans(),
)
def test_no_body_is_a_fault_of_the_server(
    server: Served, path: str, body: dict[str, Any], is_whole: bool
) -> None:
    if is_whole:
        body = {"messages": HELLO, "prompt": "a", "max_tokens": 1} | body
        body.pop("prompt" if "chat" in path else "messages")
        body["stream"] = False
    status, said = post(server, path, body)
    assert status in (200, 400, 404), said


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX'")
def test_the_command_serves_and_ends_what_it_began(pack_of: PackOf) -> None:
    command = [sys.executable, "-m", "layerpack.cli.main", "serve", str(pack_of("llama"))]
    command += ["--port", "0", "--device", "cpu", "--context", "600", "--grace", "20"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert " at http://127.0.0.1:" in line, line
        url = line.rsplit(" ", 1)[1].strip()
        client = openai.OpenAI(base_url=url, api_key="-", max_retries=0)
        stream = client.chat.completions.create(
            model=pack_of("llama").name, messages=HELLO, max_tokens=300, temperature=0, stream=True
        )
        chunks = iter(stream)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        finish = [chunk.choices[0].finish_reason for chunk in chunks][-1]
        said = process.stderr.read()
    assert finish in ("length", "stop")
    assert process.returncode in (0, -signal.SIGTERM), said
    assert "ending: 1 answers under way" in said


def wait_until(so: Callable[[], bool], within_s: float = 20) -> None:
    deadline_s = time.monotonic() + within_s
    while not so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
