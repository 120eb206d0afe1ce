"""Whole conversions from the Hub: the directory's pack, after a server that died as well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.hub.server import COMMIT, HubServer
from support.hub.source import REPO, shards
from support.packs.comparing import differing
from support.packs.unfinished import partial_of, run_until, stamps

from layerpack.convert.api import convert
from layerpack.convert.hub.source import HubSource
from layerpack.convert.options import ConvertOptions
from layerpack.formats.errors import HubError, TargetError


def test_conversion_equals_that_of_the_directory(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    convert(str(checkpoint), tmp_path / "from-directory")
    convert(REPO, tmp_path / "from-hub")
    for path in sorted((tmp_path / "from-directory").iterdir()):
        if path.name != "layerpack.json":  # which names the source
            assert (tmp_path / "from-hub" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "from-hub").iterdir())) == len(
        list((tmp_path / "from-directory").iterdir())
    )
    assert not (tmp_path / "cache").exists()


def test_server_that_dies_in_mid_conversion_and_comes_back(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    convert(str(checkpoint), tmp_path / "wanted")
    last = shards(checkpoint)[-1].name
    hub.fail(f"^/cdn/.*{last}")  # its header
    hub.fail(f"^/cdn/.*{last}", status=403, times=9)
    with pytest.raises(HubError, match=last):
        convert(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    convert(REPO, tmp_path / "out")
    for path in (tmp_path / "wanted").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_shards_are_deleted_on_the_way_also_behind_a_link(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    most = 0

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal most
        most = max(most, len(shards(tmp_path / "disk" / "out.layerpack-partial" / "source")))

    manifest = convert(REPO, tmp_path / "link" / "out", None, progress)
    assert 0 < most <= HubSource.max_held_files < len(manifest.source.files)


def test_a_repository_that_was_changed_meanwhile(hub: HubServer, tmp_path: Path) -> None:
    run_until(REPO, tmp_path / "out", 0.6)
    hub.repos[REPO].revisions = {"main": "d" * 40, "old": COMMIT}
    with pytest.raises(TargetError) as caught:
        convert(REPO, tmp_path / "out")
    said = f"of commit {COMMIT}, not of {'d' * 40}; finish that one with --revision {COMMIT}, rem"
    assert said in str(caught.value)
    before = stamps(tmp_path / "out")
    manifest = convert(REPO, tmp_path / "out", ConvertOptions(revision=COMMIT))
    assert manifest.source.revision == COMMIT
    assert all((tmp_path / "out" / n).stat().st_ino == inode for n, (inode, _) in before.items())


def test_starting_over_keeps_what_was_just_fetched(hub: HubServer, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ConvertOptions(block_size=128)
    run_until(REPO, out, 0.6)
    left = shards(partial_of(out) / "source")
    assert left
    seen: list[Path] = []

    def progress(done_bytes: int, total_bytes: int) -> None:
        if not seen:
            seen.extend(shards(partial_of(out) / "source"))

    convert(REPO, out, replace(options, force=True), progress)
    assert left[-1] not in seen
    convert(REPO, tmp_path / "wanted", options)
    assert not differing(out, tmp_path / "wanted")


def test_options_reach_the_source(hub: HubServer, tmp_path: Path) -> None:
    hub.repos[REPO].revisions["old"] = "e" * 40
    options = ConvertOptions(revision="old", keep_source=True)
    manifest = convert(REPO, tmp_path / "out", options)
    assert manifest.source.revision == "e" * 40
    assert shards(tmp_path / "cache")
