"""A server of a tiny pack, in this process, on a port of its own."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn

from layerpack.runtime import Model, OpenOptions
from layerpack.serving.app import Settings, create_app

ON_CPU = OpenOptions(device="cpu")


@dataclass(frozen=True, slots=True)
class Served:
    """Where it is, and the model behind it."""

    url: str
    model: Model


@contextmanager
def served(
    pack: Path, *, kv_tokens: int = 3000, opened: OpenOptions = ON_CPU, **settings: Any
) -> Iterator[Served]:
    """Serve the pack for the length of the block."""
    how = replace(opened, context_tokens=1500, kv_tokens=kv_tokens)
    with Model.open(pack, how) as model, socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = create_app(model, Settings(**({"names": ("tiny", "random/tiny")} | settings)))
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        deadline_s = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        try:
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", model)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def post(server: Served, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Status and JSON of the answer to a raw request."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        connection.request("POST", path, raw, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()
