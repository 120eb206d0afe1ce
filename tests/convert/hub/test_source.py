"""A Hub repository read as a source: the same tensors as its directory, at one commit."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from support.hub.server import COMMIT, HubServer
from support.hub.source import REPO, open_hub, shards, take_all

from layerpack.convert.source.directory import DirectorySource


def test_same_tensors_as_the_directory_and_scratch_emptied_on_the_way(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    with open_hub(tmp_path) as source, DirectorySource(checkpoint) as wanted:
        assert (source.kind, source.id, source.revision) == ("hub", REPO, COMMIT)
        assert source.tensors == wanted.tensors
        assert not shards(tmp_path / "scratch")
        assert not (source.config_dir / "modeling_own.py").exists()
        assert (source.config_dir / "config.json").read_bytes() == (
            checkpoint / "config.json"
        ).read_bytes()
        for name, tensor in take_all(source).items():
            assert torch.equal(tensor, wanted.read(name))
        assert not shards(tmp_path / "scratch")
        largest = sorted(path.stat().st_size for path in shards(checkpoint))[-3:]
        assert source.scratch_bytes == sum(largest)


def test_opening_takes_one_listing_and_no_weights(hub: HubServer, tmp_path: Path) -> None:
    with open_hub(tmp_path) as source:
        assert hub.num_requests("^/api/models/") == 1
        ranges = [r.range for r in hub.log if r.path.startswith("/cdn/")]
        assert len(ranges) == len(source.files)
        assert None not in ranges


def test_headers_are_read_from_a_server_that_ignores_ranges(hub: HubServer, tmp_path: Path) -> None:
    with open_hub(tmp_path) as source:
        wanted = source.tensors
    hub.ignores_ranges = True
    with open_hub(tmp_path) as source:
        assert source.tensors == wanted


def test_digest_is_what_the_hub_states(hub: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    with open_hub(tmp_path) as source:
        name = source.files[0].name
        wanted = "sha256:" + hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
        assert source.files[0].identity == wanted
        source.fetch(name, lambda _: None)
        assert source.digest(name) == wanted


def test_revision_is_pinned_to_its_commit(hub: HubServer, tmp_path: Path) -> None:
    other = "d" * 40
    hub.repos[REPO].revisions["v1.0"] = other
    with open_hub(tmp_path, revision="v1.0") as source:
        assert source.revision == other
        take_all(source)
    assert hub.num_requests("/resolve/") == hub.num_requests(f"/resolve/{other}/")


def test_environment_variables_reach_the_client(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    """HF_ENDPOINT and HF_HUB_OFFLINE are read when huggingface_hub is imported: a process each."""
    script = (
        "import sys; from pathlib import Path; from layerpack.convert.hub.source import HubSource\n"
        "from layerpack.convert.hub.client import list_repo\n"
        "listing = list_repo(sys.argv[1], None)\n"
        "source = HubSource(listing, scratch=Path(sys.argv[2]), keep_source=True)\n"
        "for facts in source.files: source.fetch(facts.name, lambda _: None)\n"
        "print(source.revision)"
    )
    common = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
    for more in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        result = subprocess.run(
            [sys.executable, "-c", script, REPO, str(tmp_path / "scratch")],
            env={**common, **more},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == COMMIT
