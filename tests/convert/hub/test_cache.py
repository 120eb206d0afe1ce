"""What earlier downloads left: orphans are cleared, kept sources serve the next run offline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from support.hub.server import COMMIT, HubServer
from support.hub.source import REPO, message_of, open_hub, shards, take_all


def test_orphans_of_killed_downloads_are_cleared_and_whole_shards_used(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    with open_hub(tmp_path) as source:
        name = source.files[0].name
        source.fetch(name, lambda _: None)
    orphan = tmp_path / "scratch" / ".cache" / "huggingface" / "download" / "x.y.incomplete"
    orphan.write_bytes(b"partial")
    before = len(hub.log)
    with open_hub(tmp_path) as source:
        assert not orphan.exists()
        take_all(source)
    assert [r.range for r in hub.log[before:] if r.path.startswith(f"/cdn/{REPO}/{name}")] == [
        "bytes=0-100000"
    ]


def test_kept_source_goes_to_the_usual_cache_and_serves_the_next_run_offline(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_hub(tmp_path, keep_source=True) as source:
        assert source.scratch_bytes == 0
        wanted, facts = take_all(source), source.files
    assert len(shards(tmp_path / "cache")) == len(facts)
    before = hub.num_requests("^/cdn/")
    with open_hub(tmp_path) as source:
        assert source.scratch_bytes == 0
        take_all(source)
    assert hub.num_requests("^/cdn/") == before
    assert len(shards(tmp_path / "cache")) == len(facts)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.log)
    with open_hub(tmp_path) as source:
        assert (source.revision, source.files) == (COMMIT, facts)
        again = take_all(source)
    assert all(torch.equal(wanted[name], again[name]) for name in wanted)
    assert len(hub.log) == before


def test_damaged_copy_in_the_cache_is_refused_by_its_path(hub: HubServer, tmp_path: Path) -> None:
    with open_hub(tmp_path, keep_source=True) as source:
        take_all(source)
    path = shards(tmp_path / "cache")[0]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.resolve().write_bytes(raw)
    with open_hub(tmp_path) as source:
        text = message_of(lambda: source.fetch(path.name, lambda _: None))
    assert str(path) in text
    assert "cached copy is damaged" in text


def test_offline_without_a_copy(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in message_of(lambda: open_hub(tmp_path))
    assert not hub.log
