"""GGUF models in repositories: their headers by range requests, their weights when it is time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hub.server import HubServer, Repo
from support.hub.source import REPO, turn_client_to
from support.models.gguf_file import write_gguf
from support.models.llama_cpp import write_like_llama_cpp
from support.packs.comparing import differing

from layerpack.convert import ConvertOptions, convert
from layerpack.convert.forecast import forecast
from layerpack.convert.gguf import files
from layerpack.convert.hub import errors
from layerpack.formats.errors import SourceError
from layerpack.formats.manifest.facts import MANIFEST_NAME

NAME = "tiny-Q8_0.gguf"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    (tmp_path / "repo").mkdir()
    return write_gguf(tmp_path / "repo" / NAME)


@pytest.fixture
def hub(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer()
    with server.running():
        server.repos[REPO] = Repo(directory=local.parent)
        turn_client_to(server, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(errors, "WAITS_S", (0.01, 0.02))
        yield server


@pytest.mark.parametrize("first_bytes", [1, 1000, 1 << 24])
def test_its_pack_is_that_of_the_file(
    hub: HubServer,
    local: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first_bytes: int,
) -> None:
    convert(str(local), tmp_path / "wanted")
    monkeypatch.setattr(files, "_FIRST_BYTES", first_bytes)
    found = convert(REPO, tmp_path / "found")
    assert differing(tmp_path / "wanted", tmp_path / "found") == [MANIFEST_NAME]
    assert (found.source.kind, found.source.id) == ("gguf", f"{REPO}/{NAME}")
    assert found.source.revision is not None
    assert not (tmp_path / "found.layerpack-partial").exists()


def test_a_look_at_it_downloads_nothing(hub: HubServer, local: Path) -> None:
    told = forecast(REPO)
    assert told.download_bytes == local.stat().st_size
    assert all(request.range for request in hub.log if "/cdn/" in request.path)


def test_a_kept_one_is_in_the_cache(hub: HubServer, local: Path, tmp_path: Path) -> None:
    convert(REPO, tmp_path / "first", options=ConvertOptions(keep_source=True))
    asked = hub.num_requests("/cdn/")
    assert [path.name for path in (tmp_path / "cache").rglob("*.gguf")] == [NAME]
    convert(REPO, tmp_path / "second")
    assert hub.num_requests("/cdn/") == asked
    assert not differing(tmp_path / "first", tmp_path / "second")


def test_parts_are_found_and_read(
    hub: HubServer, local: Path, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint_of("llama")
    local.unlink()
    first = write_like_llama_cpp(local, source, parts=2)
    convert(str(first), tmp_path / "wanted")
    convert(REPO, tmp_path / "found")
    assert differing(tmp_path / "wanted", tmp_path / "found") == [MANIFEST_NAME]


def test_several_are_named_and_an_address_chooses(
    hub: HubServer, local: Path, tmp_path: Path
) -> None:
    write_gguf(local.with_name("tiny-F16.gguf"), kind="F16")
    where = f"{hub.url}/{REPO}/blob/main"
    with pytest.raises(SourceError) as caught:
        convert(REPO, tmp_path / "pack")
    assert f"holds 2 GGUF models; give the address of one, as {where}/tiny-F16.gguf" in str(
        caught.value
    )
    found = convert(f"{where}/{NAME}", tmp_path / "pack")
    assert found.source.id == f"{REPO}/{NAME}"
    with pytest.raises(SourceError, match=r"has no file nothing\.gguf"):
        convert(f"{where}/nothing.gguf", tmp_path / "other")


@pytest.mark.parametrize(
    "harm",
    [
        lambda hub: hub.fail("/cdn/", cut_after_bytes=1000),
        lambda hub: hub.fail("/cdn/", status=503, times=2),
    ],
)
def test_broken_answers_are_asked_again(
    hub: HubServer, local: Path, tmp_path: Path, harm: Callable[[HubServer], None]
) -> None:
    harm(hub)
    convert(REPO, tmp_path / "found")
    convert(str(local), tmp_path / "wanted")
    assert differing(tmp_path / "wanted", tmp_path / "found") == [MANIFEST_NAME]


def test_one_that_is_none_is_told_in_one_line(hub: HubServer, local: Path, tmp_path: Path) -> None:
    local.write_bytes(local.read_bytes()[:3000])
    with pytest.raises(SourceError, match=f"^{REPO}/{NAME}: cannot be read as a GGUF") as caught:
        convert(REPO, tmp_path / "pack")
    assert "\n" not in str(caught.value)


def test_servers_that_know_no_ranges(hub: HubServer, tmp_path: Path) -> None:
    hub.ignores_ranges = True
    convert(REPO, tmp_path / "found")
