"""Hub repositories as sources, with huggingface_hub's own client against a server that we run."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hub_server import COMMIT, TOKEN, HubServer, Repo
from huggingface_hub import constants

from layerpack.convert import hub_errors
from layerpack.convert.api import convert
from layerpack.convert.directory import DirectorySource
from layerpack.convert.hub import HubSource
from layerpack.convert.options import ConvertOptions
from layerpack.convert.remaining import Remaining
from layerpack.formats.errors import DiskFullError, HubError, SourceError, UnsupportedError

REPO = "org/tiny"
FIRST = "model-00001-of-"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama in several shards, with what a repository has beside them."""
    from tiny import make_checkpoint
    from transformers import AutoModelForCausalLM

    path = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama", num_hidden_layers=5)
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="120KB")
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
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_errors, "WAITS_S", (0.01, 0.02, 0.03, 0.04))
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def open_hub(tmp_path: Path, **options: Any) -> HubSource:
    settings: dict[str, Any] = {"revision": None, "keep_source": False, **options}
    return HubSource.open(REPO, scratch=tmp_path / "scratch", **settings)


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
    return sorted(path.rglob("*.safetensors"))


def message_of(action: Callable[[], object]) -> str:
    with pytest.raises(HubError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    return text


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


def test_headers_are_read_from_a_server_that_ignores_ranges(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_hub(tmp_path) as source:
        wanted = source.tensors
    hub.ignores_ranges = True
    monkeypatch.setattr("layerpack.convert.hub_client._FIRST_BYTES", 20)
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


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 429, "headers": {"Retry-After": "1"}},
        {"status": 503, "times": 2},
        {"status": 500},
    ],
)
@pytest.mark.parametrize("path", ["^/api/models/", "/resolve/.*config.json", f"^/cdn/.*{FIRST}"])
def test_goes_on_after_refusals_that_pass(
    hub: HubServer, tmp_path: Path, fault: dict[str, Any], path: str
) -> None:
    hub.fail(path, **fault)
    with open_hub(tmp_path) as source:
        take_all(source)
    assert not hub.faults[0].times


def test_waits_as_long_as_the_server_asks(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(hub_errors, "_wait", lambda wait_s, check: waits.append(wait_s))
    hub.fail("^/api/models/", status=429, headers={"Retry-After": "77"})
    hub.fail("^/api/models/", status=429, headers={"Retry-After": "5000"})
    open_hub(tmp_path)
    assert waits == [77, hub_errors.LONGEST_WAIT_S]


def test_a_long_wait_ends_when_the_conversion_does(hub: HubServer, tmp_path: Path) -> None:
    class EndedError(Exception):
        pass

    def report(count_bytes: int) -> None:
        raise EndedError

    with open_hub(tmp_path) as source:
        name = source.files[0].name
        hub.fail(f"^/cdn/.*{name}", status=500, times=9, headers={"Retry-After": "100"})
        begin = time.monotonic()
        with pytest.raises(EndedError):
            source.fetch(name, report)
        assert time.monotonic() - begin < 30


def test_gives_up_in_plain_words_after_too_many_refusals(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("^/api/models/", status=503, times=99)
    assert "status 503" in message_of(lambda: open_hub(tmp_path))
    assert hub.num_requests("^/api/models/") == 5
    hub.faults.clear()
    hub.fail("^/api/models/", status=429, times=99)
    assert "too many requests (429)" in message_of(lambda: open_hub(tmp_path))


def test_connection_cut_inside_a_shard_is_taken_up_at_that_byte(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    with open_hub(tmp_path) as source:
        name = source.files[0].name
        hub.fail(f"^/cdn/.*{name}", cut_after_bytes=70_000)
        before = len(hub.log)
        take_all(source)
    assert "bytes=70000-" in [r.range for r in hub.log[before:] if name in r.path]


def test_wrong_digest_is_refused_after_one_more_try(hub: HubServer, tmp_path: Path) -> None:
    name = shards(hub.repos[REPO].directory)[0].name
    hub.repos[REPO].stated_sha256[name] = "0" * 64
    with open_hub(tmp_path) as source:
        text = message_of(lambda: source.fetch(name, lambda _: None))
    assert name in text
    assert "its sha256 is" in text
    assert hub.num_requests(f"^/cdn/.*{name}") == 3  # header, and twice all of it
    assert not shards(tmp_path / "scratch")


def copied(checkpoint: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(checkpoint, tmp_path / "mutable"))


def test_shard_that_is_damaged_once_is_downloaded_again(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    directory = hub.repos[REPO].directory = copied(checkpoint, tmp_path)
    with open_hub(tmp_path) as source:
        shard = shards(directory)[0]
        whole = shard.read_bytes()
        hub.repos[REPO].stated_sha256[shard.name] = hashlib.sha256(whole).hexdigest()
        shard.write_bytes(whole[:-1] + b"?")
        hub.fail(f"^/cdn/.*{shard.name}")  # the damaged one goes out once
        hub.fail(f"^/cdn/.*{shard.name}", hook=lambda: shard.write_bytes(whole) and None)
        assert take_all(source).keys() == source.tensors.keys()


def test_shard_that_shrinks_between_two_tries_is_refused(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    directory = hub.repos[REPO].directory = copied(checkpoint, tmp_path)
    shard = shards(directory)[0]
    whole = shard.read_bytes()
    with open_hub(tmp_path) as source:
        hub.fail(f"^/cdn/.*{shard.name}", cut_after_bytes=70_000)
        hub.fail(f"^/cdn/.*{shard.name}", hook=lambda: shard.write_bytes(whole[:60_000]) and None)
        text = message_of(lambda: source.fetch(shard.name, lambda _: None))
        assert shard.name in text
        assert f"60000 bytes arrived where the Hub states {len(whole)}" in text


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
        "import sys; from pathlib import Path; from layerpack.convert.hub import HubSource\n"
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


def test_cache_too_small_is_known_beforehand(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("layerpack.convert.hub_download.shutil.disk_usage", lambda _: usage)
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
    with pytest.raises(HubError, match="org/none: no such repository"):
        convert("org/none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_revision(hub: HubServer, tmp_path: Path) -> None:
    text = message_of(lambda: open_hub(tmp_path, revision="v9"))
    assert "v9" in text
    assert "no such revision" in text


def test_no_network(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in message_of(lambda: open_hub(tmp_path))


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: shards(d)[1].unlink(), "missing"),
        (lambda d: shards(d)[1].write_bytes(b"\xff" * 500), "not a safetensors file"),
        (lambda d: shards(d)[1].write_bytes(shards(d)[1].read_bytes()[:-8]), "truncated"),
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


def test_environment_variables_reach_the_client(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    """HF_ENDPOINT and HF_HUB_OFFLINE are read when huggingface_hub is imported: a process each."""
    script = (
        "import sys; from pathlib import Path; from layerpack.convert.hub import HubSource\n"
        "source = HubSource.open(sys.argv[1], revision=None, scratch=Path(sys.argv[2]),"
        " keep_source=True)\n"
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


def test_options_reach_the_source(hub: HubServer, tmp_path: Path) -> None:
    hub.repos[REPO].revisions["old"] = "e" * 40
    options = ConvertOptions(revision="old", keep_source=True)
    manifest = convert(REPO, tmp_path / "out", options)
    assert manifest.source.revision == "e" * 40
    assert shards(tmp_path / "cache")


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
