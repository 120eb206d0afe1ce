"""The server under load, on a tiny model on the CPU: figures that a test suite has no time for.

    python tests/fuzz/server_load.py [--requests 500] [--clients 64] [--fuzz-seconds 600]

Many clients at once, of whom a quarter leave in the middle and a tenth send nonsense; every whole
answer is held against `generate`. Then hypothesis' bodies for the given time: no 5xx, no hang. Then
an idle server's share of a CPU. Ends in one line of JSON; exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import openai
from support.models.tiny import make_checkpoint
from support.runs.bodies import bodies
from support.runs.requests import slots_taken
from support.runs.served import Served, post, served

from layerpack.convert.api import convert
from layerpack.runtime import GenerateOptions


def load(server: Served, *, requests: int, clients: int) -> dict[str, Any]:
    """Many clients; what was wrong, what was left over."""
    chance, how = random.Random(5), GenerateOptions(max_new_tokens=20)
    wanted = [server.model.generate(f"number {n}", how).text for n in range(40)]
    kinds = [
        "leaves" if draw < 0.25 else "bad" if draw < 0.35 else "stream" if draw < 0.6 else "whole"
        for draw in (chance.random() for _ in range(requests))
    ]
    wrong: list[str] = []

    def ask(number: int) -> None:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
        said: dict[str, Any] = {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"number {number % 40}"}],
            "max_tokens": 20,
            "temperature": 0,
        }
        kind, text = kinds[number], None
        try:
            if kind == "bad":
                try:
                    client.chat.completions.create(**said, extra_body={"wrong": [number]})
                    wrong.append(f"{number}: nonsense was answered")
                except openai.BadRequestError:
                    pass
            elif kind == "leaves":
                stream = client.chat.completions.create(**said | {"max_tokens": 200}, stream=True)
                next(iter(stream))
                stream.close()
            elif kind == "stream":
                chunks = client.chat.completions.create(**said, stream=True)
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            else:
                text = client.chat.completions.create(**said).choices[0].message.content
        except Exception as error:
            wrong.append(f"{number} ({kind}): {error!r}")
        finally:
            client.close()
        if text is not None and text != wanted[number % 40]:
            wrong.append(f"{number}: another text")

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(requests)))
    while server.model.counts.running:
        time.sleep(0.05)
    return {
        "requests": requests,
        "wrong": wrong,
        "slots left over": slots_taken(server.model),
    }


def growth(server: Served) -> dict[str, Any]:
    """kB of memory, threads and files after each few hundred requests, by a client that has none.

    OpenAI's client, in the same process, keeps some 80 kB of each that was made.
    """
    marks = []
    for _ in range(4):
        for number in range(300):
            body = {"messages": [{"role": "user", "content": f"{number % 40}"}], "max_tokens": 4}
            status, _ = post(server, "/v1/chat/completions", body)
            assert status == 200
        gc.collect()
        marks.append((_memory_kb(), threading.active_count(), len(os.listdir("/proc/self/fd"))))
    return {"kB, threads, files": marks}


def fuzz(server: Served, seconds: float) -> dict[str, Any]:
    """Bodies of any kind, for so long."""
    import warnings

    strategy = bodies(5)
    statuses: dict[str, int] = {}
    faults: list[str] = []
    end_s = time.monotonic() + seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while time.monotonic() < end_s:
            body = strategy.example()
            for path in ("/v1/chat/completions", "/v1/completions"):
                usual = {"messages": [{"role": "user", "content": "a"}], "prompt": "a"}
                whole = {"max_tokens": 1, **usual, **body}
                whole.pop("prompt" if "chat" in path else "messages", None)
                for said in (body, whole):
                    status, answer = post(server, path, said)
                    statuses[str(status)] = statuses.get(str(status), 0) + 1
                    if status >= 500:
                        faults.append(f"{said!r}: {answer}")
    return {"statuses": statuses, "faults": faults[:5]}


def idle(server: Served, seconds: float = 10.0) -> dict[str, float]:
    """The share of a CPU of a server that nobody asks, and passes meanwhile."""
    passes, begin_s = server.model.counts.passes, time.process_time()
    time.sleep(seconds)
    share = (time.process_time() - begin_s) / seconds
    return {"CPU share": round(share, 4), "passes": server.model.counts.passes - passes}


def _memory_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--fuzz-seconds", type=float, default=600)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = make_checkpoint(Path(folder) / "source", "llama")
        convert(str(source), Path(folder) / "pack")
        with served(Path(folder) / "pack", kv_tokens=4000) as server:
            found = {"load": load(server, requests=options.requests, clients=options.clients)}
            found["growth"] = growth(server)
            found["idle"] = idle(server)
            found["fuzz"] = fuzz(server, options.fuzz_seconds)
    print(json.dumps(found))
    is_wrong = found["load"]["wrong"] or found["load"]["slots left over"] or found["fuzz"]["faults"]
    return 1 if is_wrong or found["idle"]["passes"] else 0


if __name__ == "__main__":
    sys.exit(main())
