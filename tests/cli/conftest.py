"""`layerpack inspect` run here, sources for it, and what a command leaves in a process."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.hub.server import HubServer, Repo
from support.hub.source import REPO, turn_client_to
from support.models.tiny import make_sharded

from layerpack.cli.main import main
from layerpack.convert.hub import errors as hub_errors

Run = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def collected_again() -> Iterator[None]:
    """A command leaves its objects to the end of its process; here there is more to come."""
    yield
    gc.unfreeze()


@pytest.fixture
def inspect(capfd: pytest.CaptureFixture[str]) -> Run:
    """`inspect(*arguments)`: the parsed JSON; `inspect(*arguments, text=True)`: what is printed."""

    def get(*arguments: object, text: bool = False, code: int = 0) -> Any:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["inspect", *map(str, arguments), *([] if text else ["--json"])])
        output = capfd.readouterr()
        assert (ended.value.code or 0) == code, output.err
        if code:
            (line,) = (line for line in output.err.splitlines() if "error: " in line)
            return line
        return output.out if text else json.loads(output.out)

    return get


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files."""
    return make_sharded(tmp_path_factory.mktemp("sharded"))


@pytest.fixture
def hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer()
    with server.running():
        server.repos[REPO] = Repo(directory=sharded)
        turn_client_to(server, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(hub_errors, "WAITS_S", (0.01, 0.02))
        yield server


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("generate", …)`: the command, in this process."""

    def call(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        text = capsys.readouterr()
        code = ended.value.code or 0  # None is an end without an error
        assert isinstance(code, int)
        return Done(code=code, out=text.out, err=text.err)

    return call


@pytest.fixture
def generate(run: Run, pack_of: Callable[..., Path]) -> Run:
    """`generate(…)` with the tiny llama, 12 tokens unless said otherwise."""

    def call(*arguments: object, pack: Path | None = None) -> Any:
        given = ["--max-new-tokens", 12] if "--max-new-tokens" not in arguments else []
        return run("generate", pack or pack_of("llama"), "--device", "cpu", *given, *arguments)

    return call
