"""The room that downloads take: known beforehand, shared with the pack, and used up on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub.server import HubServer
from support.hub.source import REPO, open_hub, shards

from layerpack.convert.api import convert
from layerpack.convert.options import ConvertOptions
from layerpack.convert.output.remaining import Remaining
from layerpack.formats.errors import DiskFullError


def test_cache_too_small_is_known_beforehand(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("layerpack.convert.hub.download.shutil.disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match=r"1\.0 kB are free"):
        open_hub(tmp_path, keep_source=True)


def test_a_cache_on_the_pack_s_disk_takes_of_the_same_room(
    hub: HubServer, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Remaining] = []
    options = ConvertOptions(keep_source=True)
    source_bytes = sum(path.stat().st_size for path in shards(checkpoint))
    usage = type("Usage", (), {"free": source_bytes + 1000})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage)
        with pytest.raises(DiskFullError, match=r"of pack and .* of downloads are to be written"):
            convert(REPO, tmp_path / "out", options, announce=heard.append)
    assert not (tmp_path / "out.layerpack-partial").exists()
    assert not shards(tmp_path / "cache")
    convert(REPO, tmp_path / "out", options)
    convert(REPO, tmp_path / "again", options, announce=heard.append)
    assert [work.kept_bytes for work in heard] == [source_bytes, 0]
    assert [work.scratch_bytes for work in heard] == [0, 0]


def test_a_cache_on_another_disk_takes_none_of_the_pack_s_room(
    hub: HubServer, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Remaining] = []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small_disk / "cache"))
    options = ConvertOptions(keep_source=True)
    convert(REPO, tmp_path / "out", options, announce=heard.append)
    assert heard[0].download_bytes and not heard[0].kept_bytes


def test_what_a_conversion_takes_is_told_beforehand_and_less_of_it_when_it_goes_on(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    sizes = {path.name: path.stat().st_size for path in shards(checkpoint)}
    heard: list[Remaining] = []
    requests: list[int] = []

    def announce(work: Remaining) -> None:
        heard.append(work)
        requests.append(hub.num_requests("^/cdn/"))

    class StopError(Exception):
        pass

    def stop(done_bytes: int, total_bytes: int) -> None:
        if done_bytes > 0.7 * total_bytes:
            raise StopError

    with pytest.raises(StopError):
        convert(REPO, tmp_path / "out", None, stop, announce=announce)
    left = {path.name for path in shards(tmp_path / "out.layerpack-partial" / "source")}
    convert(REPO, tmp_path / "out", announce=announce)
    first, second = heard
    assert requests[0] == len(sizes)  # their headers
    assert first.download_bytes == first.fetched_bytes == sum(sizes.values())
    assert first.scratch_bytes >= sum(sorted(sizes.values())[-3:])
    assert (first.done_blobs, first.num_blobs) == (0, 7)
    assert 0 < second.done_blobs < 7
    assert second.pack_bytes < first.pack_bytes
    assert left
    assert second.scratch_bytes <= first.scratch_bytes - sum(sizes[name] for name in left)


def test_shards_left_by_a_break_need_no_room_again(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that has just room for the rest of the pack is enough if the downloads are there."""
    with open_hub(tmp_path / "out.layerpack-partial") as source:
        for facts in source.files:
            source.fetch(facts.name, lambda _: None)
        assert source.scratch_bytes
    (tmp_path / "out.layerpack-partial" / "scratch").rename(
        tmp_path / "out.layerpack-partial" / "source"
    )
    heard: list[Remaining] = []
    convert(REPO, tmp_path / "out", announce=heard.append)
    assert heard[0].scratch_bytes == 0


def test_full_disk_in_mid_download_says_what_lacks_and_goes_on_after(
    hub: HubServer, checkpoint: Path, tmp_path: Path, small_disk: Path
) -> None:
    convert(str(checkpoint), tmp_path / "wanted")
    filler = small_disk / "filler"

    def fill(done_bytes: int, total_bytes: int) -> None:
        with open(filler, "ab", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass

    with pytest.raises(DiskFullError, match=r"the disk is full, .* and .* are free; make room"):
        convert(REPO, small_disk / "out", None, fill)
    assert not (small_disk / "out").exists()
    filler.unlink()
    convert(REPO, small_disk / "out")
    for path in (tmp_path / "wanted").glob("*.safetensors"):
        assert (small_disk / "out" / path.name).read_bytes() == path.read_bytes()
