"""`layerpack inspect` where there is no pack yet, and against the source where there is one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from support.hub.server import COMMIT, HubServer, Repo
from support.hub.source import REPO, turn_client_to
from support.models.oracles import quantised_reference
from support.models.tiny import make_checkpoint, make_sharded
from support.packs.unfinished import run_until
from support.runs.imports import HEAVY, imported_by

from layerpack.cli import progress
from layerpack.cli.main import main
from layerpack.convert import ConvertOptions, convert
from layerpack.convert.hub import errors as hub_errors
from layerpack.convert.output.destination import Destination
from layerpack.convert.output.unfinished import read_unfinished
from layerpack.formats.manifest.facts import UNFINISHED_SUFFIX
from layerpack.formats.pack import Pack

Run = Callable[..., Any]


@pytest.fixture
def inspect(capfd: pytest.CaptureFixture[str]) -> Run:
    """`inspect(*arguments)`: the parsed JSON; `inspect(*arguments, text=True)`: what is printed."""

    def get(*arguments: object, text: bool = False, code: int = 0) -> Any:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["inspect", *map(str, arguments), *([] if text else ["--json"])])
        output = capfd.readouterr()
        assert (ended.value.code or 0) == code, output.err
        if code:
            (line,) = (line for line in output.err.splitlines() if "error: " in line)
            return line
        return output.out if text else json.loads(output.out)

    return get


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files."""
    return make_sharded(tmp_path_factory.mktemp("sharded"))


@pytest.fixture
def hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer()
    with server.running():
        server.repos[REPO] = Repo(directory=sharded)
        turn_client_to(server, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(hub_errors, "WAITS_S", (0.01, 0.02))
        yield server


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
    if not Path("/proc/locks").exists():
        pytest.skip("needs /proc/locks")
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


def test_errors_are_those_of_bitsandbytes(
    pack_of: Callable[..., Path], checkpoint_of: Callable[..., Path], inspect: Run
) -> None:
    path, source = pack_of("qwen2"), load_file(checkpoint_of("qwen2") / "model.safetensors")
    rows = {row["file"]: row for row in inspect(path, "--stats")["errors"]}
    model = dict(quantised_reference(path).named_modules())
    for blob in Pack.open(path).manifest.blobs:
        errors, off, norm = {}, 0.0, 0.0
        for entry in blob.tensors:
            if entry.name not in source:
                continue
            wanted = source[entry.name].double()
            module = model[entry.name.rpartition(".")[0]]
            have = module.weight.detach() if entry.name.endswith("weight") else wanted
            if entry.name in blob.nf4 and hasattr(module.weight, "quant_state"):
                have = dequantize_4bit(module.weight.data, module.weight.quant_state)
            squares = float((have.double() - wanted).square().sum())
            off, norm = off + squares, norm + float(wanted.square().sum())
            errors[entry.name] = (squares / float(wanted.square().sum())) ** 0.5
        worst = max(errors, key=lambda name: errors[name])
        row = rows[blob.file]
        assert row["error"] == pytest.approx((off / norm) ** 0.5, rel=1e-9, abs=1e-15)
        assert row["worst_error"] == pytest.approx(errors[worst], rel=1e-9, abs=1e-15)
        if blob.nf4:
            assert row["worst_tensor"] == worst and 0.05 < row["error"] < 0.12


def test_stats_see_a_weight_that_is_off(
    pack_of: Callable[..., Path], checkpoint_of: Callable[..., Path], tmp_path: Path, inspect: Run
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint_of("llama-odd"), source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = -tensors[name]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    arguments = (pack_of("llama-odd"), "--stats", "--source", source)
    rows = inspect(*arguments)["errors"]
    assert rows[2]["worst_tensor"] == name and 1.9 < rows[2]["worst_error"] < 2.1
    assert rows[1]["error"] < 0.12 < rows[2]["error"]
    assert f"worst of all: {name}" in inspect(*arguments, text=True)


def test_a_pack_made_from_nf4_has_no_error(
    pack_of: Callable[..., Path], tmp_path: Path, inspect: Run
) -> None:
    source = pack_of("llama", nf4_head=True)
    convert(str(source), tmp_path / "out")
    assert all(row["error"] == 0 for row in inspect(tmp_path / "out", "--stats")["errors"])


def test_stats_draw_no_bar_into_a_file(
    pack_of: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(pack_of("qwen2")), "--stats"])
    error = capfd.readouterr().err
    assert not ended.value.code
    assert "\r" not in error
    assert error.splitlines()[-1].startswith("compare: 100 %, ")


@pytest.mark.parametrize("target", ["/", "//", "/usr/.."])
def test_the_root_directory_is_no_pack(target: str, inspect: Run) -> None:
    assert "no layerpack.json in it, so not a pack" in inspect(target, code=1)


def test_nothing_but_the_suffix_is_no_unfinished_work(tmp_path: Path, inspect: Run) -> None:
    place = tmp_path / UNFINISHED_SUFFIX
    place.mkdir()
    assert "no layerpack.json in it, so not a pack" in inspect(place, code=1)


def test_stats_need_the_right_source(
    pack_of: Callable[..., Path], checkpoint_of: Callable[..., Path], tmp_path: Path, inspect: Run
) -> None:
    path = pack_of("qwen2")
    other = checkpoint_of("llama")
    assert "name the checkpoint with --source" in inspect(
        path, "--stats", "--source", tmp_path / "none", code=1
    )
    assert "not the model that" in inspect(path, "--stats", "--source", other, code=1)
    wider = checkpoint_of("qwen2", intermediate_size=208)
    assert "has the shape [208, 96]" in inspect(path, "--stats", "--source", wider, code=1)
    assert "no such directory" in inspect(tmp_path / "none", "--stats", code=1)


def test_a_hub_source_is_taken_from_the_cache(hub: HubServer, tmp_path: Path, inspect: Run) -> None:
    for options in (ConvertOptions(), ConvertOptions(keep_source=True)):
        out = tmp_path / f"out-{options.keep_source}"
        convert(REPO, out, options)
        if options.keep_source:
            assert max(row["error"] for row in inspect(out, "--stats")["errors"]) < 0.12
        else:
            assert "not in the local cache" in inspect(out, "--stats", code=1)


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


def test_an_all_zero_tensor_has_no_error(tmp_path: Path, inspect: Run) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(str(source), tmp_path / "out")
    (row,) = inspect(tmp_path / "out", "--stats")["errors"][1:2]
    assert row["worst_tensor"] != name and 0.05 < row["error"] < 0.12
