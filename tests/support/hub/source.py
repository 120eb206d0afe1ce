"""A repository of hub_server as a source: opened, read, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from support.hub.server import HubServer

from layerpack.convert.hub.client import list_repo
from layerpack.convert.hub.source import HubSource
from layerpack.formats.errors import HubError

REPO = "org/tiny"


def turn_client_to(server: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let huggingface_hub talk to `server`, without a token, and keep downloads in `cache`."""
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def open_hub(
    tmp_path: Path, *, revision: str | None = None, keep_source: bool = False
) -> HubSource:
    """REPO; downloads go to `tmp_path / "scratch"`."""
    listing = list_repo(REPO, revision)
    return HubSource(listing, scratch=tmp_path / "scratch", keep_source=keep_source)


def take_all(source: HubSource) -> dict[str, torch.Tensor]:
    """Every tensor, file by file, as the pipeline would read them."""
    tensors = {}
    for facts in source.files:
        arrived: list[int] = []
        source.fetch(facts.name, arrived.append)
        assert sum(arrived) >= facts.file_bytes
        for name, tensor in source.tensors.items():
            if tensor.file == facts.name:
                tensors[name] = source.read(name)
        source.release(facts.name)
    return tensors


def shards(path: Path) -> list[Path]:
    """The files of weights under `path`, in the order of their names."""
    return sorted(path.rglob("*.safetensors"))


def message_of(action: Callable[[], object]) -> str:
    """The one line of the HubError that `action` ends with."""
    with pytest.raises(HubError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    return text


def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "mutable"))
