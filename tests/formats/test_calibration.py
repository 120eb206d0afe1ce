"""A calibration's files: what is written is read again, what is damaged is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from layerpack.formats.calibration.calibration import Calibration
from layerpack.formats.calibration.inputs import PARTS, USERS, Inputs, layer_bytes, layer_name
from layerpack.formats.calibration.record import RECORD_NAME, Record, record_bytes
from layerpack.formats.digest import bytes_digest
from layerpack.formats.errors import CalibrationError

RECORD = Record(
    producer="layerpack 0",
    architecture="LlamaForCausalLM",
    num_layers=2,
    source="here",
    text=bytes_digest(b"text"),
    num_tokens=2048,
    group_columns=64,
    damping=0.3,
)


def some_inputs(columns: int) -> Inputs:
    draw = np.random.default_rng(columns)
    return Inputs(
        importance=draw.random(columns).astype(np.float32),
        order=draw.permutation(columns).astype(np.int32),
        feedback=draw.random((columns, 64)).astype(np.float16),
    )


def written(path: Path) -> Path:
    path.mkdir()
    digests = []
    for layer in range(2):
        inputs = {f"l.{layer}.q": some_inputs(64), f"l.{layer}.down": some_inputs(128)}
        users = {f"l.{layer}.{name}.weight": f"l.{layer}.q" for name in ("q", "k")}
        data = layer_bytes(inputs, users | {f"l.{layer}.down.weight": f"l.{layer}.down"})
        (path / layer_name(layer)).write_bytes(data)
        digests.append(bytes_digest(data))
    (path / RECORD_NAME).write_bytes(record_bytes(RECORD, digests))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = Calibration.open(written(tmp_path / "cal"))
    found.verify()
    assert found.record == RECORD
    assert found.users["l.1.k.weight"] == "l.1.q" and len(found.users) == 6
    assert found.num_columns["l.0.down"] == 128
    for part in ("importance", "order", "feedback"):
        np.testing.assert_array_equal(
            getattr(found.inputs("l.1.down"), part), getattr(some_inputs(128), part)
        )


def test_the_same_calibration_is_the_same_bytes(tmp_path: Path) -> None:
    one, other = written(tmp_path / "one"), written(tmp_path / "other")
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()
    assert Calibration.open(one).digest == Calibration.open(other).digest


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no calibration"):
        Calibration.open(tmp_path / "none")
    path = written(tmp_path / "cal")
    file = path / layer_name(1)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CalibrationError, match=r"layer-001\.safetensors: damaged"):
        Calibration.open(path).verify()
    file.write_bytes(whole[:100])
    with pytest.raises(CalibrationError, match=r"layer-001\.safetensors: cannot be read"):
        Calibration.open(path)
    file.unlink()
    with pytest.raises(CalibrationError, match=r"layer-001\.safetensors: cannot be read"):
        Calibration.open(path)


@pytest.mark.parametrize(
    ("part", "wrong", "why"),
    [
        ("importance", np.zeros(64, np.float32), "not positive"),
        ("importance", np.full(64, np.nan, np.float32), "not positive"),
        ("importance", np.ones(65, np.float32), "order is int32"),
        ("importance", np.ones(64, np.float64), "importance is float64"),
        ("importance", np.ones((64, 1), np.float32), "2 dimensions"),
        ("importance", np.ones((), np.float32), "0 dimensions"),
        ("order", np.zeros(64, np.int32), "every column once"),
        ("order", np.arange(1, 65, dtype=np.int32), "every column once"),
        ("order", np.arange(64, dtype=np.int64), "order is int64"),
        ("order", np.arange(32, dtype=np.int32), "order is int32"),
        ("feedback", np.zeros((64, 32), np.float16), "feedback is float16"),
        ("feedback", np.zeros((64, 64), np.float32), "feedback is float32"),
        ("feedback", np.full((64, 64), np.inf, np.float16), "not finite"),
        ("feedback", np.full((64, 64), np.nan, np.float16), "not finite"),
    ],
)
def test_what_would_lead_arithmetic_astray_is_refused(
    tmp_path: Path, part: str, wrong: Any, why: str
) -> None:
    """Whole files with right digests, of a tool that got them wrong: nothing checks its bounds."""
    path = written(tmp_path / "cal")
    inputs = {"l.0.q": replace(some_inputs(64), **{part: wrong})}
    data = layer_bytes(inputs, {"l.0.q.weight": "l.0.q"})
    (path / layer_name(0)).write_bytes(data)
    digests = [bytes_digest((path / layer_name(layer)).read_bytes()) for layer in range(2)]
    (path / RECORD_NAME).write_bytes(record_bytes(RECORD, digests))
    with pytest.raises(CalibrationError, match=why) as error:
        Calibration.open(path).inputs("l.0.q")
    assert "\n" not in str(error.value) and layer_name(0) in str(error.value)


@pytest.mark.parametrize("users", ["[]", "{", '{"l.0.q.weight": 3}', '{"l.0.q.weight": "none"}'])
def test_users_that_are_none_are_refused(tmp_path: Path, users: str) -> None:
    path = written(tmp_path / "cal")
    tensors = {f"l.0.q.{part}": getattr(some_inputs(64), part) for part in PARTS}
    (path / layer_name(0)).write_bytes(save(tensors, metadata={USERS: users}))
    with pytest.raises(CalibrationError, match=r"layer-000\.safetensors: cannot be read"):
        Calibration.open(path)


@pytest.mark.parametrize("columns", [0, -64, 1000])
def test_groups_that_are_not_whole_are_refused(tmp_path: Path, columns: int) -> None:
    path = written(tmp_path / "cal")
    fields = json.loads((path / RECORD_NAME).read_bytes()) | {"group_columns": columns}
    (path / RECORD_NAME).write_text(json.dumps(fields))
    with pytest.raises(CalibrationError, match=f"group_columns is {columns}"):
        Calibration.open(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_record_is_read_or_refused(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "cal"
    if not path.exists():
        written(path)
        (tmp_path / "whole").write_bytes((path / RECORD_NAME).read_bytes())
    fields = json.loads((tmp_path / "whole").read_bytes())
    anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    key = data.draw(st.sampled_from([*fields, "other"]))
    value = data.draw(anything | st.lists(anything, max_size=3))
    (path / RECORD_NAME).write_text(json.dumps(fields | {key: value}))
    try:
        found = Calibration.open(path)
    except CalibrationError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert key == "other" or getattr(found.record, key, value) == value
