"""Files in Xet storage, which hf_xet fetches: its errors, and the end of a conversion."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from support.hub.server import HubServer
from support.hub.source import REPO, message_of, open_hub

from layerpack.convert.api import convert

pytest.importorskip("hf_xet")


def test_what_it_cannot_fetch_is_told_in_plain_words(hub: HubServer, tmp_path: Path) -> None:
    hub.repos[REPO].xet_status = 404
    with open_hub(tmp_path) as source:
        name = source.files[0].name
        text = message_of(lambda: source.fetch(name, lambda _: None))
    assert text.startswith(f"{REPO}: {name}: the download failed (")
    assert "404" in text and text.endswith("; run again")
    assert hub.num_requests("/v1/recon")


def test_it_ends_with_the_conversion(hub: HubServer, tmp_path: Path) -> None:
    """Otherwise Ctrl-C would have to wait until it has tried often enough, or has the shard."""

    class EndedError(Exception):
        pass

    ended = threading.Event()

    def report(count_bytes: int) -> None:
        if ended.is_set():
            raise EndedError

    hub.repos[REPO].xet_status = 500
    with open_hub(tmp_path) as source:
        threading.Timer(1, ended.set).start()
        begin_s = time.monotonic()
        with pytest.raises(EndedError):
            source.fetch(source.files[0].name, report)
        assert time.monotonic() - begin_s < 10
    assert hub.num_requests("/v2/recon")


def test_another_error_of_the_callers_own_is_not_taken_for_one(
    hub: HubServer, tmp_path: Path
) -> None:
    def progress(done_bytes: int, total_bytes: int) -> None:
        raise RuntimeError("the caller's")

    with pytest.raises(RuntimeError, match="the caller's"):
        convert(REPO, tmp_path / "out", None, progress)
