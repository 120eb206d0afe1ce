"""`layerpack inspect --stats`: how far a pack's weights are from those of its source."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from support.hub.server import HubServer
from support.hub.source import REPO
from support.models.oracles import quantised_reference
from support.models.tiny import make_checkpoint

from layerpack.cli import progress
from layerpack.cli.main import main
from layerpack.convert import ConvertOptions, convert
from layerpack.formats.pack import Pack

Run = Callable[..., Any]


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


def test_an_all_zero_tensor_has_no_error(tmp_path: Path, inspect: Run) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(str(source), tmp_path / "out")
    (row,) = inspect(tmp_path / "out", "--stats")["errors"][1:2]
    assert row["worst_tensor"] != name and 0.05 < row["error"] < 0.12
