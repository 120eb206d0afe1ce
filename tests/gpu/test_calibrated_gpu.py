"""Codes and scales of a calibration on a GPU: those of the CPU, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.calibrations import calibration_of

from layerpack.convert.gptq.encoder import CalibratedEncoder
from layerpack.formats.calibration.inputs import Inputs

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
    on_cpu, on_gpu = (
        CalibratedEncoder(
            calibration, {"w"}, block_size=block_size, device=torch.device(device)
        ).encode("w", weight)
        for device in ("cpu", "cuda")
    )
    assert torch.equal(on_cpu[1], on_gpu[1])
    assert torch.equal(on_cpu[0], on_gpu[0])
