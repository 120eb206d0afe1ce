"""What earlier downloads left: orphans are cleared, kept sources serve the next run offline."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
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
        f"bytes=0-{min(100_000, (checkpoint / name).stat().st_size) - 1}"
    ]


def kill_in_download(hub: HubServer, tmp_path: Path, shard: Path) -> Path:
    """What a process leaves in the usual cache that is killed as it waits for bytes."""
    script = (
        "import sys; from pathlib import Path; from layerpack.convert.hub.source import HubSource\n"
        "source = HubSource.open(sys.argv[1], revision=None, scratch=Path(sys.argv[2]),"
        " keep_source=True)\n"
        "source.fetch(sys.argv[3], lambda _: None)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, REPO, str(tmp_path / "scratch"), shard.name],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")},
    )
    hub.fail(f"/cdn/{REPO}/{shard.name}", cut_after_bytes=None)  # the request for its header
    hub.fail(f"/cdn/{REPO}/{shard.name}", hook=child.kill)
    assert child.wait(timeout=60) == -signal.SIGKILL
    (orphan,) = (tmp_path / "cache").rglob("*.incomplete")
    return orphan


def test_orphans_in_the_usual_cache_are_cleared_if_nobody_can_be_writing_them(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    shard = shards(checkpoint)[0]
    orphan = kill_in_download(hub, tmp_path, shard)
    sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
    assert orphan.name.startswith(sha256)
    others = [
        orphan.with_name(f"{'0' * 64}.01234567.incomplete"),
        orphan.with_name(f"{sha256}.incomplete"),  # older huggingface_hub: it goes on with it
    ]
    for path in others:
        path.write_bytes(b"x")
    with open_hub(tmp_path, keep_source=True) as source:
        assert orphan.exists()  # written a moment ago
    for path in (orphan, *others):
        os.utime(path, (time.time() - 3600,) * 2)
    open_hub(tmp_path)
    assert orphan.exists()  # not ours to clear: nothing is downloaded there
    lock = tmp_path / "cache" / ".locks" / "models--org--tiny" / f"{sha256}.lock"
    with FileLock(lock), open_hub(tmp_path, keep_source=True):
        pass
    assert orphan.exists()
    with open_hub(tmp_path, keep_source=True) as source:
        assert not orphan.exists()
        orphan.write_bytes(b"x")
        os.utime(orphan, (time.time() - 3600,) * 2)
        take_all(source)
    assert sorted((tmp_path / "cache").rglob("*.incomplete")) == sorted(others)
    with open_hub(tmp_path, keep_source=True) as source:
        take_all(source)


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
