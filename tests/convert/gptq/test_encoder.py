"""Codes and scales of a calibration against plain numpy, one operation at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.calibrations import Known, calibration_of, inputs_from

from layerpack.convert.gptq import encoder as encoder_module
from layerpack.convert.gptq.encoder import CalibratedEncoder
from layerpack.convert.nf4.blocks import encode_blocks
from layerpack.formats.blob.nf4 import NF4_CODES
from layerpack.formats.calibration.calibration import Calibration
from layerpack.formats.errors import CalibrationError

CPU = torch.device("cpu")
VALUES = np.array(NF4_CODES, np.float32)
MIDDLES = (VALUES[1:] + VALUES[:-1]) / np.float32(2)
RATIOS = [np.float32(ratio) for ratio in (1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)]


def encoder_of(path: Path, known: Known, block_size: int = 64) -> CalibratedEncoder:
    calibration = calibration_of(path, known)
    return CalibratedEncoder(calibration, {"w"}, block_size=block_size, device=CPU)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed >> 4, packed & 15], 1).flatten()


def plainly(
    weight: np.ndarray[Any, Any], known: Known, block_size: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Codes, one each, and scales: float32 arithmetic over all rows at once, column by column."""
    rows, columns = weight.shape
    scales = np.empty((rows, columns // block_size), np.float32)
    one, zero = np.float32(1), np.float32(0)
    for block in range(scales.shape[1]):
        part = slice(block * block_size, (block + 1) * block_size)
        values, importance = weight[:, part], known.importance[part]
        most = np.abs(values).max(1)
        best, gain = most.copy(), np.zeros(rows, np.float32)
        for ratio in RATIOS:
            scale = most * ratio
            inverse = np.divide(one, scale, where=scale > 0, out=np.zeros_like(scale))
            aimed, norm = (np.zeros(rows, np.float32) for _ in range(2))
            for column in range(block_size):
                value, weighed = values[:, column], importance[column]
                code = VALUES[np.searchsorted(MIDDLES, value * inverse)]
                aimed = aimed + (weighed * code) * value
                norm = norm + (weighed * code) * code
            scale = np.divide(aimed, norm, where=aimed > zero, out=np.zeros_like(norm))
            best = np.where(aimed * scale > gain, scale, best)
            gain = np.maximum(aimed * scale, gain)
        scales[:, block] = best
    codes = np.empty((rows, columns), np.uint8)
    left, group = weight.copy(), known.feedback.shape[1]
    for place, column in enumerate(known.order):
        scale = scales[:, column // block_size]
        value = left[:, column]
        share = np.divide(value, scale, where=scale > 0, out=np.zeros_like(value))
        codes[:, column] = np.searchsorted(MIDDLES, share)
        error = value - VALUES[codes[:, column]] * scale
        end = min(place // group * group + group, columns)
        for behind in range(place + 1, end):
            factor = np.float32(known.feedback[place, behind % group])
            left[:, known.order[behind]] = left[:, known.order[behind]] - error * factor
    return codes, scales


@pytest.mark.parametrize("rows", [1, 63, 65, 130])
@pytest.mark.parametrize(
    ("columns", "group", "block_size"),
    [(64, 64, 64), (320, 128, 64), (256, 256, 128), (96, 64, 32)],
)
def test_every_bit_is_that_of_plain_arithmetic(
    tmp_path: Path, rows: int, columns: int, group: int, block_size: int
) -> None:
    torch.manual_seed(rows + columns)
    known = inputs_from(torch.randn(400, columns) @ torch.randn(columns, columns), group)
    weight = (torch.randn(rows, columns) * 0.02).bfloat16()
    weight[0, :block_size] = 0  # a block of nothing
    codes, scales = encoder_of(tmp_path, known, block_size).encode("w", weight)
    wanted, wanted_scales = plainly(weight.float().numpy(), known, block_size)
    assert np.array_equal(scales.view(rows, -1).numpy(), wanted_scales)
    assert np.array_equal(unpack_codes(codes).view(rows, columns).numpy(), wanted)
    assert (wanted[0, :block_size] == 7).all() or rows == 1


def test_the_bytes_do_not_depend_on_the_processor(tmp_path: Path) -> None:
    """What vector units there are, and whether they fuse operations, is the compiler's to use."""
    program = (
        "import hashlib, sys, torch\n"
        "from pathlib import Path\n"
        "from layerpack.convert.gptq.encoder import CalibratedEncoder\n"
        "from layerpack.formats.calibration.calibration import Calibration\n"
        "torch.manual_seed(1); weight = torch.randn(130, 320) * 0.02\n"
        "encoder = CalibratedEncoder(Calibration.open(Path(sys.argv[1])), {'w'}, block_size=64,"
        " device=torch.device('cpu'))\n"
        "parts = encoder.encode('w', weight)\n"
        "print(hashlib.md5(b''.join(part.numpy().tobytes() for part in parts)).hexdigest())\n"
    )
    torch.manual_seed(0)
    calibration_of(tmp_path, inputs_from(torch.randn(400, 320) @ torch.randn(320, 320), 128))
    found = {
        subprocess.run(
            [sys.executable, "-c", program, tmp_path],
            env=os.environ | how,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for how in ({}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""})
    }
    assert len(found) == 1 and len(found.pop()) == 33


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [(0, 0), (149, 191), (64, 100)])
def test_what_is_not_finite_shows_in_the_scales(
    tmp_path: Path, wrong: float, at: tuple[int, int]
) -> None:
    encoder = encoder_of(tmp_path, inputs_from(torch.randn(300, 192), 64))
    weight = (torch.randn(150, 192) * 0.02).bfloat16()
    assert encoder.encode("w", weight)[1].isfinite().all()
    weight[at] = wrong
    assert not encoder.encode("w", weight)[1].isfinite().all()


def test_inputs_are_made_ready_once_for_threads_that_come_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(tmp_path, inputs_from(torch.randn(300, 192), 64))
    weight = (torch.randn(20, 192) * 0.02).bfloat16()
    usual, made = Calibration.inputs, []

    def slow(self: Calibration, name: str) -> Known:
        made.append(name)
        time.sleep(0.2)
        if len(made) == 1:
            raise CalibrationError("cannot be read")
        return usual(self, name)

    monkeypatch.setattr(Calibration, "inputs", slow)
    with pytest.raises(CalibrationError, match="cannot be read"):
        encoder.encode("w", weight)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: encoder.encode("w", weight), range(8)))
    assert made == ["w", "w"]  # the one that failed, and one for all
    assert all(torch.equal(codes, found[0][0]) for codes, _ in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parts_of_a_weight_are_its_own(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = inputs_from(torch.randn(300, 192), 64)
    weight = (torch.randn(150, 192) * 0.02).to(dtype)
    encoder = encoder_of(tmp_path, known)
    codes, scales = encoder.encode("w", weight)
    for begin in range(0, 150, 31):
        rows = slice(begin, begin + 31)
        some, their = encoder.encode("w", weight[rows])
        assert torch.equal(some, codes.view(150, -1)[rows].flatten())
        assert torch.equal(their, scales.view(150, -1)[rows].flatten())
    monkeypatch.setattr(encoder_module, "_SHARE", 192 * 31 + 5)  # as a GGUF tensor that comes whole
    in_shares = encoder.encode("w", weight)
    assert torch.equal(in_shares[0], codes) and torch.equal(in_shares[1], scales)


def test_what_comes_out_is_nearer(tmp_path: Path) -> None:
    """For inputs that are unlike each other and vary together, by far."""
    torch.manual_seed(0)
    sizes = torch.logspace(-1, 1, 256)[torch.randperm(256)]
    inputs = torch.randn(2000, 256) @ torch.randn(256, 256).mul(0.1).add(torch.eye(256)) * sizes
    weight = torch.randn(128, 256) * 0.02

    def error(codes: torch.Tensor, scales: torch.Tensor) -> float:
        values = torch.tensor(NF4_CODES)[unpack_codes(codes).long()].view(128, -1, 64)
        found = (values * scales.view(128, -1, 1)).view(128, 256)
        return float((inputs @ (found - weight).T).square().mean())

    usual = error(*encode_blocks(weight, block_size=64, device=CPU))
    nearest = inputs_from(inputs, 64)
    nearest.feedback[:] = 0
    weighed = error(*encoder_of(tmp_path / "a", nearest).encode("w", weight))
    few = error(*encoder_of(tmp_path / "b", inputs_from(inputs, 64)).encode("w", weight))
    found = error(*encoder_of(tmp_path / "c", inputs_from(inputs, 256)).encode("w", weight))
    assert found < 0.9 * few < 0.9 * weighed < 0.8 * usual
