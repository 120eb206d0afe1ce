"""A calibration against transformers' own inputs, and what breaks leave of it."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.calibrations import inputs_from
from support.models.oracles import quantised_reference

from layerpack.convert.api import convert
from layerpack.convert.options import ConvertOptions
from layerpack.formats.calibration.calibration import Calibration
from layerpack.formats.errors import (
    CalibrationError,
    DiskFullError,
    PackError,
    PromptError,
    TargetError,
)
from layerpack.formats.pack import Pack
from layerpack.runtime import Model, OpenOptions
from layerpack.runtime.quality import calibrate as at_work
from layerpack.runtime.quality.calibrate import Unfinished, calibrate, making, record_of, work_of
from layerpack.runtime.quality.input_sums import (
    DAMPING,
    InputSums,
    LastInput,
    linear_modules,
    sums_bytes,
)
from layerpack.runtime.quality.windows import Windows, read_text, windows_of
from layerpack.runtime.tokenizer import load_tokenizer

PackOf = Callable[..., Path]
ON_CPU = OpenOptions(device="cpu")
PLENTY = 1 << 40


def windows(pack: Path, most: int = 20) -> Windows:
    tokenizer = load_tokenizer(pack)
    return windows_of(read_text(None), tokenizer, num_tokens=64, most=most, where="Alice")


def make(pack: Path, target: Path, *, memory_bytes: int = PLENTY, at_a_time: int = 7) -> Path:
    text = windows(pack)
    with (
        making(target, record_of(Pack.open(pack), text)) as unfinished,
        Model.open(pack, ON_CPU) as model,
    ):
        work = work_of(model, unfinished.missing, memory_bytes)
        calibrate(model, text, at_a_time, work, unfinished)
        unfinished.finish()
    return target


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_inputs_that_are_not_finite_are_said(wrong: float) -> None:
    module = torch.nn.Linear(64, 64)
    sums, rows = InputSums("layers.3", {"q_proj": module}), torch.randn(2048, 64)
    rows[1000, 7] = wrong
    with sums.watching(LastInput()), torch.no_grad():
        module(rows)
    with pytest.raises(CalibrationError, match=r"inputs of layers\.3\.q_proj are not finite"):
        sums.found()


@pytest.mark.parametrize("group", [64, 1024])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "phi3"])
def test_inputs_are_those_of_transformers(
    pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, group: int
) -> None:
    for module in ("input_sums", "calibrate"):
        monkeypatch.setattr(f"layerpack.runtime.quality.{module}.GROUP_COLUMNS", group)
    pack = pack_of(name)
    found = Calibration.open(make(pack, tmp_path / "cal"))
    found.verify()
    theirs = quantised_reference(pack)
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)

    def note(weight: str) -> Any:
        return lambda module, inputs: seen[weight].append(inputs[0].flatten(0, -2).float())

    for path, module in theirs.named_modules():
        if f"{path}.weight" in found.users:
            module.register_forward_pre_hook(note(f"{path}.weight"))
    with torch.no_grad():
        theirs(windows(pack).ids)
    assert len(seen) == sum(len(blob.nf4) for blob in Pack.open(pack).manifest.blobs)
    for weight, rows in seen.items():
        inputs = found.inputs(found.users[weight])
        wanted = inputs_from(torch.cat(rows), group, DAMPING)
        importance = wanted.importance / wanted.importance.mean()
        np.testing.assert_allclose(inputs.importance, importance, rtol=1e-3)
        # Their order is that of all passes, ours of the first: compared are the same columns.
        own = inputs_in_order(torch.cat(rows), inputs.order, group)
        np.testing.assert_allclose(inputs.feedback, own, atol=2e-3)


def inputs_in_order(rows: torch.Tensor, order: Any, group: int) -> Any:
    """The feedback for columns in an order that is given."""
    squares = (rows.double().T @ rows.double()) / len(rows)
    damping = DAMPING * squares.diagonal().mean()
    places = torch.from_numpy(order).long()
    feedback = torch.zeros(len(places), min(group, len(places)))
    for begin in range(0, len(places), group):
        own = places[begin : begin + group]
        hessian = squares[own][:, own] + damping * torch.eye(len(own))
        for place in range(len(own)):
            inverse = torch.linalg.inv(hessian[place:, place:])
            feedback[begin + place, place + 1 : len(own)] = inverse[0, 1:] / inverse[0, 0]
    return feedback.numpy()


def test_weights_with_the_same_inputs_share_them(pack_of: PackOf, tmp_path: Path) -> None:
    users = Calibration.open(make(pack_of("llama"), tmp_path / "cal")).users
    first = "model.layers.1"
    assert {users[f"{first}.self_attn.{name}_proj.weight"] for name in "qkv"} == {
        f"{first}.self_attn.q_proj"
    }
    assert users[f"{first}.mlp.up_proj.weight"] == f"{first}.mlp.gate_proj"
    assert len(set(users.values())) == 4 * 3


def test_rounds_of_layers_give_the_same(pack_of: PackOf, tmp_path: Path) -> None:
    pack = pack_of("llama")
    whole = contents(make(pack, tmp_path / "whole"))
    with Model.open(pack, ON_CPU) as model:
        one = sums_bytes(linear_modules(model.network.model.layers[0]))
        for memory, rounds in ((0, 3), (2 * one, 2), (PLENTY, 1)):
            assert len(work_of(model, [0, 1, 2], memory).rounds) == rounds
    assert contents(make(pack, tmp_path / "few", memory_bytes=0)) == whole


def test_a_conversion_of_the_same_name_is_left_alone(
    checkpoint_of: PackOf, pack_of: PackOf, tmp_path: Path
) -> None:
    """Both are worked at beside their target; either goes on afterwards."""

    def broken(done_bytes: int, total_bytes: int) -> None:
        if done_bytes > total_bytes // 2:
            raise KeyboardInterrupt

    source, target = str(checkpoint_of("llama")), tmp_path / "mine"
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, ConvertOptions(device="cpu"), broken)
    (unfinished,) = tmp_path.iterdir()
    before = {file: file.read_bytes() for file in unfinished.rglob("*") if file.is_file()}
    calibration = make(pack_of("llama"), target).rename(tmp_path / "calibration")
    assert {file: file.read_bytes() for file in before} == before
    convert(source, target, ConvertOptions(device="cpu"))
    assert contents(target) == contents(pack_of("llama"))
    with pytest.raises(PackError, match="calibration: a calibration, not a pack; it is for"):
        Pack.open(calibration)


def test_a_break_costs_no_finished_layer(
    pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, target = pack_of("llama"), tmp_path / "cal"
    whole = contents(make(pack, tmp_path / "whole"))
    usual = Unfinished.put

    def broken(self: Unfinished, layer: int, data: bytes) -> None:
        if layer == 1:
            raise KeyboardInterrupt
        usual(self, layer, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Unfinished, "put", broken)
        make(pack, target)
    assert not target.exists()
    assert contents(make(pack, target)) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cal", "whole"]


def test_what_is_left_of_another_text_is_not_taken(pack_of: PackOf, tmp_path: Path) -> None:
    pack, target = pack_of("llama"), tmp_path / "cal"
    opened = Pack.open(pack)
    with making(target, record_of(opened, windows(pack))) as unfinished:
        unfinished.put(0, b"of this text")
    with making(target, record_of(opened, windows(pack))) as unfinished:
        assert unfinished.missing == [1, 2]
    with (
        pytest.raises(TargetError, match="unfinished calibration by another text") as error,
        making(target, record_of(opened, windows(pack, 19))),
    ):
        pass
    with making(target, record_of(opened, windows(pack))) as unfinished:
        assert unfinished.missing == [1, 2]
    shutil.rmtree(str(error.value).split(": holds")[0])
    with making(target, record_of(opened, windows(pack, 19))) as unfinished:
        assert unfinished.missing == [0, 1, 2]


def test_one_process_at_a_time(pack_of: PackOf, tmp_path: Path) -> None:
    record = record_of(Pack.open(pack_of("llama")), windows(pack_of("llama")))
    with making(tmp_path / "cal", record) as unfinished:
        with (
            pytest.raises(TargetError, match="another process is making it"),
            making(tmp_path / "cal", record),
        ):
            pass
        unfinished.put(0, b"the second took nothing away")
    with making(tmp_path / "cal", record) as unfinished:
        assert 0 not in unfinished.missing


def test_what_is_not_a_calibrations_is_left(pack_of: PackOf, tmp_path: Path) -> None:
    record = record_of(Pack.open(pack_of("llama")), windows(pack_of("llama")))
    with making(tmp_path / "cal", record):
        (partial,) = tmp_path.iterdir()
    assert not partial.exists()
    partial.mkdir()
    (partial / "notes").write_text("mine")
    with making(tmp_path / "cal", record):
        pass
    assert [file.name for file in partial.iterdir()] == ["notes"]


def test_a_full_disk(pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, target = pack_of("llama"), tmp_path / "cal"

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(at_work, "write_whole", full)
        with pytest.raises(DiskFullError, match="cal: the disk is full; make room"):
            make(pack, target)
    assert not target.exists()
    make(pack, target)
    with pytest.raises(TargetError, match="cal: is there already"):
        make(pack, target)


def test_a_text_that_is_too_short(pack_of: PackOf) -> None:
    with pytest.raises(PromptError, match="960 tokens in whole windows: too few"):
        record_of(Pack.open(pack_of("llama")), windows(pack_of("llama"), 15))
