"""Servers that refuse, cut and damage: what is tried again, and what is given up in plain words."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from support.hub.server import HubServer
from support.hub.source import REPO, copied, message_of, open_hub, shards, take_all

from layerpack.convert.hub import errors as hub_errors

FIRST = "model-00001-of-"


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
