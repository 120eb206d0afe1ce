"""Conversions with a calibration: plain NF4 packs, the same bytes each time, nearer the source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.calibrations import calibration_for
from support.models.oracles import quantised_reference

from layerpack.convert.api import convert
from layerpack.convert.options import ConvertOptions
from layerpack.convert.pipeline import weights
from layerpack.formats.calibration.calibration import Calibration
from layerpack.formats.errors import CalibrationError, PackError, SourceError, TargetError
from layerpack.formats.manifest.document import parse_manifest
from layerpack.formats.pack import Pack
from layerpack.formats.verify import verify_pack
from layerpack.runtime import Model, OpenOptions

PathOf = Callable[..., Path]


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_pack_is_plain_nf4(
    checkpoint_of: PathOf, pack_of: PathOf, tmp_path: Path, name: str
) -> None:
    calibration = calibration_for(pack_of(name), tmp_path / "cal")
    out = tmp_path / "out"
    manifest = convert(str(checkpoint_of(name)), out, ConvertOptions(calibration=calibration))
    assert manifest.quantization is not None
    used = manifest.quantization.calibration
    opened = Calibration.open(calibration)
    assert used is not None and used.digest == opened.digest
    states = [state for blob in manifest.blobs for state in blob.nf4.values()]
    assert used.num_weights == sum(state.shape[1] % 64 == 0 for state in states)
    assert used.num_weights > 0.8 * len(states) == 0.8 * len(opened.users)
    assert Pack.open(out).manifest == manifest
    verify_pack(out)
    plain = contents(pack_of(name))
    assert {file: len(data) for file, data in contents(out).items() if "layer-" in file} == {
        file: len(data) for file, data in plain.items() if "layer-" in file
    }
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        wanted = quantised_reference(out)(ids).logits
    with Model.open(out, OpenOptions(device="cpu")) as model:
        assert torch.equal(model.logits(ids, 39), wanted)


def test_the_same_bytes_however_it_is_cut_and_broken_off(
    checkpoint_of: PathOf, pack_of: PathOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(checkpoint_of("llama"))
    options = ConvertOptions(calibration=calibration_for(pack_of("llama"), tmp_path / "cal"))
    convert(source, tmp_path / "whole", options)
    whole = contents(tmp_path / "whole")
    monkeypatch.setattr(weights, "PIECE_BYTES", 3000)

    def broken(done_bytes: int, total_bytes: int) -> None:
        if done_bytes > total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", options, broken)
    convert(source, tmp_path / "out", options)
    assert contents(tmp_path / "out") == whole
    assert whole != contents(pack_of("llama"))


def test_work_of_another_calibration_is_not_gone_on_with(
    checkpoint_of: PathOf, pack_of: PathOf, tmp_path: Path
) -> None:
    source = str(checkpoint_of("llama"))

    def broken(done_bytes: int, total_bytes: int) -> None:
        if done_bytes > total_bytes // 2:  # before there is a file there is nothing to go on with
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", ConvertOptions(), broken)
    calibration = calibration_for(pack_of("llama"), tmp_path / "cal")
    with pytest.raises(TargetError, match="or with other options"):
        convert(source, tmp_path / "out", ConvertOptions(calibration=calibration))


def test_weights_that_are_not_known_are_plain(
    checkpoint_of: PathOf, pack_of: PathOf, tmp_path: Path
) -> None:
    pack = pack_of("llama")
    calibration = calibration_for(pack, tmp_path / "cal", leave_out="mlp")
    notes: list[str] = []
    convert(
        str(checkpoint_of("llama")),
        tmp_path / "out",
        ConvertOptions(calibration=calibration),
        announce=lambda work: notes.extend(work.notes),
    )
    assert "12 weights are calibrated with 2048 tokens; 9 get the nearest codes" in notes[0]
    assert notes[1].startswith("choosing codes takes about ")
    ours, theirs = (load_file(path / "layer-001.safetensors") for path in (tmp_path / "out", pack))
    assert all(
        torch.equal(ours[name], theirs[name]) == ("self_attn" not in name)
        for name in ours
        if name.endswith("proj.weight")
    )


def test_a_calibration_that_does_not_fit(
    checkpoint_of: PathOf, pack_of: PathOf, tmp_path: Path
) -> None:
    pack = pack_of("llama")
    for place, (changes, name, words) in enumerate(
        [
            ({"architecture": "Qwen2ForCausalLM"}, "llama", "of a Qwen2ForCausalLM with 3 layers"),
            ({}, "llama-tied", "of a LlamaForCausalLM with 3 layers, not of a LlamaForCausalLM"),
            ({"leave_out": ""}, "llama", "knows the inputs of none"),
        ]
    ):
        calibration = calibration_for(pack, tmp_path / str(place), **changes)
        with pytest.raises(CalibrationError, match=words):
            convert(
                str(checkpoint_of(name)),
                tmp_path / "out",
                ConvertOptions(calibration=calibration),
            )
    calibration = calibration_for(pack, tmp_path / "cal")
    options = ConvertOptions(calibration=calibration)
    with pytest.raises(CalibrationError, match="has 128 inputs, there 64: another model's"):
        convert(str(checkpoint_of("llama", hidden_size=128)), tmp_path / "out", options)
    with pytest.raises(CalibrationError, match="are NF4 already"):
        convert(str(pack), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CalibrationError, match="none: no calibration"):
        convert(
            str(checkpoint_of("llama")),
            tmp_path / "out",
            ConvertOptions(calibration=tmp_path / "none"),
        )


def test_a_weight_with_nan_is_refused_by_name(
    checkpoint_of: PathOf, pack_of: PathOf, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint_of("llama"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    calibration = calibration_for(pack_of("llama"), tmp_path / "cal")
    with pytest.raises(SourceError, match=f"tensor {name} holds NaN"):
        convert(str(source), tmp_path / "out", ConvertOptions(calibration=calibration))


def test_old_readers_go_on(checkpoint_of: PathOf, pack_of: PathOf, tmp_path: Path) -> None:
    """The manifest's version and features stay: what reads them knows nothing of calibrations."""
    calibration = calibration_for(pack_of("llama"), tmp_path / "cal")
    out = tmp_path / "out"
    convert(str(checkpoint_of("llama")), out, ConvertOptions(calibration=calibration))
    ours = json.loads((out / "layerpack.json").read_text())
    plain = json.loads((pack_of("llama") / "layerpack.json").read_text())
    assert ours.keys() == plain.keys() and ours["format_version"] == plain["format_version"]
    for key, value in (("digest", "md5:0"), ("tokens", -1), ("weights", None), ("text", 3)):
        broken = json.loads((out / "layerpack.json").read_text())
        broken["quantization"]["calibration"][key] = value
        with pytest.raises(PackError, match=f"quantization.calibration.{key} is missing or not"):
            parse_manifest(json.dumps(broken).encode(), where="here")
    del ours["quantization"]["calibration"]
    assert ours["quantization"] == plain["quantization"]
