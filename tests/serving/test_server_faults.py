"""A disk or a device that fails under a server: an error for whoever asked, and never a hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.runs.faults import Disk, break_lane
from support.runs.requests import slots_taken
from support.runs.served import Served, post, served

from layerpack.runtime import OpenOptions
from layerpack.runtime.plan.plan import Limits

FROM_DISK = OpenOptions(device="cpu", limits=Limits(host_slices=0), direct=False, watchdog_s=0.5)
PackOf = Callable[..., Path]
CHAT = "/v1/chat/completions"


def ask(server: Served, number: int) -> tuple[int, Any]:
    return post(
        server,
        CHAT,
        {
            "messages": [{"role": "user", "content": f"number {number}"}],
            "max_tokens": 12,
            "temperature": 0,
        },
    )


def texts(server: Served) -> list[str]:
    found = [ask(server, number) for number in range(6)]
    assert [status for status, _ in found] == [200] * 6, found
    return [said["choices"][0]["message"]["content"] for _, said in found]


def ask_at_once(server: Served) -> list[tuple[int, Any]]:
    begin_s = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: ask(server, number), range(6)))
    assert time.monotonic() - begin_s < 20
    return found


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("error", "Input/output error"),
        ("short", "ends at byte"),
        ("hang", "does not answer"),
        ("death", ""),
    ],
)
def test_a_disk_that_fails_under_a_server(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    """Whoever is in the pass gets an error; once the disk reads again, so does the server."""
    disk, before = Disk(monkeypatch), threading.active_count()
    with served(pack_of("llama"), opened=FROM_DISK) as server:
        wanted = texts(server)
        disk.arm(kind, after=5)
        found = ask_at_once(server)
        disk.disarm()
        assert any(status == 500 for status, _ in found)
        for number, (status, said) in enumerate(found):
            if status == 200:
                assert said["choices"][0]["message"]["content"] == wanted[number]
            else:
                assert status == 500 and words in said["error"]["message"], said
                assert said["error"]["type"] == "server_error"
                assert "\n" not in said["error"]["message"]
        assert texts(server) == wanted
        assert slots_taken(server.model) == 0
    assert threading.active_count() <= before


@pytest.mark.parametrize("after", [0, 9])
def test_a_device_that_fails_under_a_server(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """It does not come back: every request from then on hears of it, and the server ends."""
    with served(pack_of("llama"), opened=FROM_DISK) as server:
        break_lane(monkeypatch, "copy", after)
        for _ in range(2):
            for status, said in ask_at_once(server):
                assert status in (500, 503), said
                assert "device" in said["error"]["message"]
    monkeypatch.undo()
