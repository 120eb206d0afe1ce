"""`layerpack inspect` where there is no pack yet, and against the source where there is one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hub.server import COMMIT, HubServer
from support.hub.source import REPO
from support.packs.unfinished import run_until
from support.runs.imports import HEAVY, imported_by

from layerpack.cli.main import main
from layerpack.convert import convert
from layerpack.convert.output.destination import Destination
from layerpack.convert.output.unfinished import read_unfinished
from layerpack.formats.manifest.facts import UNFINISHED_SUFFIX
from layerpack.formats.pack import Pack

Run = Callable[..., Any]


def test_a_forecast_is_what_then_comes_out(sharded: Path, tmp_path: Path, inspect: Run) -> None:
    before = sorted(tmp_path.parent.iterdir())
    shown = inspect(sharded, "--tensors", "--disk", 2)
    assert shown["kind"] == "source" and sorted(tmp_path.parent.iterdir()) == before
    convert(str(sharded), tmp_path / "out")
    real = inspect(tmp_path / "out", "--tensors")
    for key in ("model", "source", "quantization", "blobs", "total_bytes"):
        assert shown[key] == real[key], key
    source_bytes = sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    wanted = shown["conversion"]
    assert (wanted["download_bytes"], wanted["scratch_bytes"]) == (0, 0)
    assert wanted["disk_bytes"] == source_bytes + real["total_bytes"]
    assert wanted["disk_s"] == wanted["disk_bytes"] / 2e9
    text = inspect(sharded, text=True)
    assert "once converted: LlamaForCausalLM, 5 layers" in text and "layers 0-4" in text
    assert "to download" not in text


def test_a_repo_is_forecast_from_its_headers_alone(
    hub: HubServer, sharded: Path, inspect: Run
) -> None:
    shown = inspect(REPO, "--download", 0.1, "--revision", "main")
    local = inspect(sharded)
    assert shown["blobs"] == local["blobs"]
    assert shown["source"]["revision"] == COMMIT
    wanted, total = shown["conversion"], local["source"]["total_bytes"]
    largest = sorted(file.stat().st_size for file in sharded.glob("*.safetensors"))[-3:]
    assert (wanted["download_bytes"], wanted["scratch_bytes"]) == (total, sum(largest))
    assert wanted["download_s"] == total / 0.1e6
    weights = [request for request in hub.log if request.path.startswith("/cdn/")]
    assert weights and all(request.range for request in weights)
    text = inspect(REPO, text=True)
    assert f"hub {REPO} at {COMMIT[:12]}" in text and "to download" in text


def test_names_of_nothing(hub: HubServer, tmp_path: Path, inspect: Run) -> None:
    assert "no such repository" in inspect("org/none", code=1)
    asked = len(hub.log)
    assert "no such directory" in inspect(tmp_path / "none", code=1)
    assert "no such directory" in inspect("none", code=1)
    assert "no layerpack.json in it" in inspect(tmp_path, code=1)
    assert "no such file" in inspect("x/none.gguf", code=1)
    (tmp_path / "a.bin").write_text("x")
    assert "not a GGUF one" in inspect(tmp_path / "a.bin", code=1)
    assert len(hub.log) == asked
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(tmp_path), "--source", "x"])
    assert ended.value.code == 2


@pytest.mark.parametrize("command", ["verify", "generate", "plan"])
def test_commands_for_packs_say_that_one_is_unfinished(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    out = tmp_path / "out"
    run_until(sharded, out, 0.5)
    prompt = ["--prompt", "a"] if command == "generate" else []
    for empty in (False, True):
        if empty:  # a target that is there and empty may be converted to
            out.mkdir()
        with pytest.raises(SystemExit) as ended:
            main([command, str(out), *prompt])
        said = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 1
        assert said == (
            f"layerpack: error: {out}: its conversion is not finished; run the same "
            "`layerpack convert` command again (`layerpack inspect` shows how far it is)"
        )


def test_unfinished_work_is_told_from_both_names(
    sharded: Path, tmp_path: Path, inspect: Run
) -> None:
    out = tmp_path / "out"
    run_until(sharded, out, 0.7)
    partial = Destination(out).partial
    shown = inspect(out)
    assert shown == inspect(partial)
    assert (shown["kind"], shown["running"]) == ("unfinished", False)
    assert (shown["out"], shown["source"]["id"]) == (str(out), str(sharded))
    assert 0 < shown["done_bytes"] < shown["total_bytes"]
    present = {file.name: file.stat().st_size for file in (partial / "pack").iterdir()}
    assert present == {file: shown["blobs"][file] for file in shown["done"]}
    assert shown["stored_bytes"] == shown["done_bytes"]
    assert sorted(shown["done"] + shown["missing"]) == sorted(shown["blobs"])
    assert len(shown["blobs"]) == 7
    text = inspect(out, text=True)
    assert f"done          {len(shown['done'])} of 7 blobs" in text
    assert "unfinished conversion in out.layerpack-partial, not running" in text
    assert "missing  " in text and "run the same" in text
    (partial / "pack" / "x.safetensors.partial").write_bytes(b"123")
    assert inspect(out)["being_written"] == {"file": "x.safetensors", "bytes": 3}
    assert not inspect(out)["done_bytes"] > shown["done_bytes"]
    (partial / "pack" / shown["done"][0]).unlink()
    assert inspect(out)["missing"] != shown["missing"]
    convert(str(sharded), out)
    assert inspect(out)["kind"] == "pack"


def test_a_running_conversion_is_told_apart(sharded: Path, tmp_path: Path, inspect: Run) -> None:
    place = Destination(tmp_path / "out")
    with place.held():
        shown = inspect(tmp_path / "out")
        assert shown["running"] is True and shown["blobs"] == {}
        assert "nothing is done yet" in inspect(tmp_path / "out", text=True)
    run_until(sharded, tmp_path / "out", 0.5)
    # Listed, and gone when it is looked at: as what a running one renames in between.
    (place.pack / "layer-004.safetensors.partial").symlink_to("gone")
    assert read_unfinished(place.partial).running is False


def test_a_look_at_unfinished_work_imports_nothing_heavy(sharded: Path, tmp_path: Path) -> None:
    run_until(sharded, tmp_path / "out", 0.5)
    modules, output = imported_by("inspect", str(tmp_path / "out"))
    assert not HEAVY & modules
    assert "unfinished" in output


@pytest.mark.parametrize("target", ["/", "//", "/usr/.."])
def test_the_root_directory_is_no_pack(target: str, inspect: Run) -> None:
    assert "no layerpack.json in it, so not a pack" in inspect(target, code=1)


def test_nothing_but_the_suffix_is_no_unfinished_work(tmp_path: Path, inspect: Run) -> None:
    place = tmp_path / UNFINISHED_SUFFIX
    place.mkdir()
    assert "no layerpack.json in it, so not a pack" in inspect(place, code=1)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_a_path_that_is_not_utf8_is_converted_and_shown(
    checkpoint_of: Callable[..., Path], tmp_path: Path, inspect: Run
) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9\x1b")
    shutil.copytree(checkpoint_of("llama"), source)
    out = tmp_path / os.fsdecode(b"out\xff")
    manifest = convert(str(source), out)
    assert Pack.open(out).manifest == manifest
    text = inspect(out, text=True)
    assert "out\\udcff: LlamaForCausalLM" in text and "caf\N{REPLACEMENT CHARACTER}\\x1b" in text
