"""A quantised weight's state as bitsandbytes writes it: there and back, and what is not one."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerpack.formats.blob import nf4
from layerpack.formats.errors import PackError

STATES = st.builds(
    nf4.Nf4State,
    shape=st.tuples(st.integers(1, 1 << 40), st.integers(1, 1 << 40)),
    block_size=st.sampled_from(nf4.BLOCK_SIZES),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    nested_offset=st.none() | st.floats(-1e37, 1e37),
)


@settings(max_examples=200, deadline=None)
@given(STATES, st.integers(0, 99))
def test_a_state_survives_and_fits_its_room(state: nf4.Nf4State, more: int) -> None:
    raw = nf4.encode_state(state, nf4.STATE_RESERVED_BYTES + more)
    assert len(raw) == nf4.STATE_RESERVED_BYTES + more
    assert nf4.decode_state(raw, where="") == state


def test_bitsandbytes_reads_and_writes_the_same_words() -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(64, 96, dtype=torch.bfloat16)
    for nested in (False, True):
        _, theirs = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        packed = theirs.as_dict(packed=True)
        (key,) = (name for name in packed if name.startswith("quant_state"))
        assert "." + key == nf4.STATE
        raw = packed[key].numpy().tobytes()
        ours = nf4.decode_state(raw, where="")
        assert (ours.shape, ours.block_size, ours.dtype) == ((64, 96), 64, "BF16")
        assert ours.double_quant == nested
        assert json.loads(nf4.encode_state(ours, 320)) == json.loads(raw)


GOOD: dict[str, Any] = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "bfloat16",
    "shape": [2, 64],
    "nested_blocksize": 256,
    "nested_dtype": "float32",
    "nested_offset": 0.5,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_type": "fp4"}, "not of type nf4"),
        ({"quant_type": ["nf4"]}, "not of type nf4"),
        ({"blocksize": 63}, "block size 63"),
        ({"blocksize": 64.0}, "block size 64.0"),
        ({"blocksize": [64]}, "block size [64]"),
        ({"blocksize": True}, "block size True"),
        ({"dtype": "int8"}, "dtype or shape"),
        ({"dtype": ["bfloat16"]}, "dtype or shape"),
        ({"shape": [-2, 64]}, "dtype or shape"),
        ({"shape": "2x64"}, "dtype or shape"),
        ({"shape": [2] * 9}, "dtype or shape"),
        ({"nested_blocksize": 128}, "nested_blocksize or nested_offset"),
        ({"nested_offset": None}, "nested_blocksize or nested_offset"),
        ({"nested_offset": "0.5"}, "nested_blocksize or nested_offset"),
        ({"nested_offset": 1e39}, "nested_blocksize or nested_offset"),
        ({"nested_offset": 10**400}, "nested_blocksize or nested_offset"),
        ({"nested_offset": True}, "nested_blocksize or nested_offset"),
    ],
)
def test_one_defect_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PackError) as caught:
        nf4.decode_state(json.dumps(GOOD | fields).encode(), where="a.weight")
    assert str(caught.value).startswith("a.weight: ") and message in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"   ", b"{", b"\xff", b"[]", b"\0" * 320, b'{"shape":NaN}'])
def test_what_is_no_state(raw: bytes) -> None:
    with pytest.raises(PackError, match="weight: the quantisation state is not"):
        nf4.decode_state(raw, where="a.weight")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.none() | st.integers() | st.floats() | st.text(max_size=5))
def test_any_value_is_read_or_refused(key: str, value: Any) -> None:
    with contextlib.suppress(PackError):
        nf4.decode_state(json.dumps(GOOD | {key: value}).encode(), where="")


def test_a_state_without_room_is_a_mistake_of_ours() -> None:
    state = nf4.Nf4State(shape=(2, 64), block_size=64, dtype="BF16", nested_offset=None)
    with pytest.raises(ValueError, match="quantisation state of"):
        nf4.encode_state(state, 40)
