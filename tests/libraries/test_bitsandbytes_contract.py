"""What layerpack/libraries/bitsandbytes_api.py builds by hand is what bitsandbytes makes itself."""

from __future__ import annotations

import inspect

import pytest
import torch

from layerpack.formats.blob import nf4
from layerpack.libraries import bitsandbytes_api
from layerpack.libraries.bitsandbytes_api import dequantise, functional, quant_state


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_quant_state_of_stored_parts_is_its_own(double_quant: bool) -> None:
    """QuantState's arguments and attributes; quantize_4bit's result as oracle."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    codes, wanted = functional().quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=double_quant
    )
    parts = {nf4.ABSMAX: wanted.absmax, nf4.QUANT_MAP: wanted.code}
    if double_quant:
        parts |= {nf4.NESTED_ABSMAX: wanted.state2.absmax, nf4.NESTED_QUANT_MAP: wanted.state2.code}
    ours = nf4.Nf4State(
        shape=(64, 128),
        block_size=64,
        dtype="F32",
        nested_offset=float(wanted.offset) if double_quant else None,
    )
    found = quant_state(ours, parts.__getitem__)
    found.offset = bitsandbytes_api.offset_tensor(ours, torch.device("cpu"))
    wanted_weight = functional().dequantize_4bit(codes, wanted)
    assert torch.equal(dequantise(codes, found), wanted_weight)


def test_names_that_are_used() -> None:
    """functional.quantize_4bit, dequantize_4bit, QuantState, and matmul_4bit beside them."""
    import bitsandbytes

    known = inspect.signature(functional().QuantState.__init__).parameters
    assert {"absmax", "shape", "code", "blocksize", "quant_type", "dtype", "state2"} <= set(known)
    assert {"A", "B", "quant_state", "bias"} <= set(
        inspect.signature(bitsandbytes.matmul_4bit).parameters
    )
