"""Codes and scales of a calibration on a GPU: those of the CPU, to the bit; and packs of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.calibrations import calibration_for, calibration_of
from support.models.oracles import quantised_reference

from layerpack.convert.api import convert
from layerpack.convert.gptq.encoder import CalibratedEncoder
from layerpack.convert.options import ConvertOptions
from layerpack.formats.calibration.inputs import Inputs
from layerpack.runtime import Model, OpenOptions

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 128, 128), (65, 896, 896), (700, 4864, 1024), (33, 640, 256)]
)
def test_the_bytes_do_not_depend_on_the_device(
    tmp_path: Path, rows: int, columns: int, group: int, block_size: int
) -> None:
    torch.manual_seed(rows)
    shares = torch.randn(columns, group) * 0.02
    shares[torch.arange(group) <= torch.arange(columns)[:, None] % group] = 0
    known = Inputs(
        importance=(torch.rand(columns) + 0.1).numpy(),
        order=torch.randperm(columns).int().numpy(),
        feedback=shares.half().numpy(),
    )
    calibration = calibration_of(tmp_path, known)
    weight = (torch.randn(rows, columns) * 0.02).bfloat16()
    weight[0, :block_size] = 0
    encoders = [
        CalibratedEncoder(calibration, {"w"}, block_size=block_size, device=torch.device(device))
        for device in ("cpu", "cuda")
    ]
    on_cpu, on_gpu = (encoder.encode("w", weight) for encoder in encoders)
    assert torch.equal(on_cpu[1], on_gpu[1])
    assert torch.equal(on_cpu[0], on_gpu[0])
    for wrong in (torch.nan, torch.inf, -torch.inf):
        weight[-1, 70] = wrong
        for encoder in encoders:
            assert not encoder.encode("w", weight)[1].isfinite().all()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_pack_is_that_of_the_cpu_and_runs_as_in_transformers(
    checkpoint_of: Callable[..., Path], pack_of: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    calibration = calibration_for(pack_of(name), tmp_path / "cal")
    for device in ("cpu", "cuda"):
        how = ConvertOptions(calibration=calibration, device=device)
        convert(str(checkpoint_of(name)), tmp_path / device, how)
    ours, theirs = (
        {file.name: file.read_bytes() for file in (tmp_path / device).iterdir()}
        for device in ("cuda", "cpu")
    )
    assert ours == theirs
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        wanted = quantised_reference(tmp_path / "cuda", "cuda")(ids.cuda()).logits
    with Model.open(tmp_path / "cuda", OpenOptions(device="cuda")) as model:
        assert torch.equal(model.logits(ids, 39), wanted)
