"""Repositories that cannot be read: not allowed, not there, out of reach, or no checkpoint."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub.server import TOKEN, HubServer
from support.hub.source import REPO, copied, message_of, open_hub, shards, take_all

from layerpack.convert.api import convert
from layerpack.convert.hub import errors as hub_errors
from layerpack.formats.errors import HubError, SourceError, UnsupportedError


def test_gated(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO].gated = True
    for token in ("", "hf_wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        text = message_of(lambda: open_hub(tmp_path))
        assert f"terms to be accepted: do so at {hub.url}/{REPO}" in text
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with open_hub(tmp_path) as source:
        take_all(source)


def test_private_or_missing(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO].private = True
    assert "no such repository" in message_of(lambda: open_hub(tmp_path))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    open_hub(tmp_path)
    with pytest.raises(
        HubError, match=r"org/none: no such rep.*, and there is no such directory here;"
    ):
        convert("org/none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_revision(hub: HubServer, tmp_path: Path) -> None:
    text = message_of(lambda: open_hub(tmp_path, revision="v9"))
    assert "v9" in text
    assert "no such revision" in text


def test_no_network(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(hub_errors, "_wait", lambda wait_s, check: waits.append(wait_s))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    text = message_of(lambda: open_hub(tmp_path))
    assert "http://127.0.0.1:9 cannot be reached" in text
    assert "), and there is no such directory here; check the network" in text
    assert "no such directory" not in message_of(lambda: open_hub(tmp_path, revision="v9"))
    assert not waits  # a name that is mistyped must not take a minute to be told


@pytest.mark.parametrize("address", ["http://localhost:99999", "http://[::1", "http://a:b"])
def test_what_is_no_address_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """huggingface_hub cannot even be imported then."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    text = message_of(lambda: open_hub(tmp_path))
    assert text.startswith(f"HF_ENDPOINT={address}: not the address of a Hub (")


def test_an_address_without_its_scheme_is_told_at_once(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(hub_errors, "_wait", lambda wait_s, check: waits.append(wait_s))
    monkeypatch.setattr(constants, "ENDPOINT", "hub.example")
    text = message_of(lambda: open_hub(tmp_path))
    assert "hub.example cannot be reached" in text and "'https://'" in text
    assert not waits


@pytest.mark.parametrize("page", [b"<html>Log in, please</html>", b"\xff\xfe\xff"])
def test_a_page_that_is_no_answer_of_a_hub(hub: HubServer, tmp_path: Path, page: bytes) -> None:
    hub.fail("^/api/models/", page=page)
    text = message_of(lambda: open_hub(tmp_path))
    assert f"{REPO}: {hub.url} answered with something else than a Hub does; check" in text


def test_a_line_that_swallows_the_question(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "cannot be reached (timed out)" in message_of(lambda: open_hub(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: shards(d)[1].unlink(), "missing"),
        (lambda d: shards(d)[1].write_bytes(b"\xff" * 500), "not a safetensors header"),
        (lambda d: [p.unlink() for p in d.glob("model*")], "no model.safetensors"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
    ],
)
def test_repositories_that_are_no_checkpoint(
    hub: HubServer,
    checkpoint: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    hub.repos[REPO].directory = copied(checkpoint, tmp_path)
    damage(hub.repos[REPO].directory)
    with pytest.raises(SourceError, match=message) as caught:
        open_hub(tmp_path)
    assert REPO in str(caught.value)


def test_a_shard_that_is_truncated_on_the_hub_is_refused_when_it_comes(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    shard = shards(copied(checkpoint, tmp_path))[1]
    hub.repos[REPO].directory = shard.parent
    shard.write_bytes(shard.read_bytes()[:-8])
    with open_hub(tmp_path) as source:
        text = message_of(lambda: source.fetch(shard.name, lambda _: None))
    assert f"{shard.name}: its header is not the one that the Hub sent before" in text


def test_unsupported_quantisation_is_refused_before_weights_are_downloaded(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    import json

    directory = hub.repos[REPO].directory = copied(checkpoint, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="gptq"):
        convert(REPO, tmp_path / "out")
    assert hub.num_requests("^/cdn/") == len(shards(directory))  # their headers
