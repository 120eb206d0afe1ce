"""A small repository, and a server of it that huggingface_hub's own client is turned to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub.server import HubServer, Repo
from support.hub.source import REPO, turn_client_to

from layerpack.convert.hub import errors as hub_errors


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama in several shards, with what a repository has beside them."""
    from support.models.tiny import make_sharded

    path = make_sharded(tmp_path_factory.mktemp("checkpoint"))
    (path / "README.md").write_text("not for the pack")
    (path / "modeling_own.py").write_text("raise SystemExit('never run')")
    assert len(list(path.glob("*.safetensors"))) >= 4
    return path


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server with the repository REPO, and huggingface_hub turned to it."""
    server = HubServer()
    with server.running():
        server.repos[REPO] = Repo(directory=checkpoint)
        turn_client_to(server, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(hub_errors, "WAITS_S", (0.01, 0.02, 0.03, 0.04))
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")
        yield server
