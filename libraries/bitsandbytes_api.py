"""bitsandbytes: its decoding and products of NF4, by states that are built from stored parts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from layerpack.formats.blob import nf4
from layerpack.libraries.dtypes import TORCH_DTYPES
from layerpack.libraries.torch_api import uncompiled


def functional() -> Any:
    """`bitsandbytes.functional`, imported without its notice about an optional CPU kernel."""
    if "bitsandbytes" not in sys.modules:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        # Two fallback kernels, which nothing here uses, are wrapped with torch.compile: that alone
        # takes longer to import than all else of it, seconds.
        with uncompiled():
            import bitsandbytes.functional
    import bitsandbytes.functional

    return bitsandbytes.functional


def quant_state(state: nf4.Nf4State, part: Callable[[str], torch.Tensor]) -> Any:
    """The QuantState over the stored parts `part(suffix)`; its `offset` is left to be set.

    Making that tensor on a CUDA device waits for the device, which is not for every bind.
    """
    make = functional().QuantState
    nested = None
    if state.double_quant:
        nested = make(
            absmax=part(nf4.NESTED_ABSMAX),
            blocksize=nf4.NESTED_BLOCK_SIZE,
            code=part(nf4.NESTED_QUANT_MAP),
            dtype=torch.float32,
        )
    return make(
        absmax=part(nf4.ABSMAX),
        shape=torch.Size(state.shape),
        code=part(nf4.QUANT_MAP),
        blocksize=state.block_size,
        quant_type="nf4",
        dtype=TORCH_DTYPES[state.dtype],
        state2=nested,
    )


def offset_tensor(state: nf4.Nf4State, device: torch.device) -> torch.Tensor | None:
    """The mean that double quantisation took off the absmax: a float32 scalar, or None."""
    if state.nested_offset is None:
        return None
    return torch.tensor(state.nested_offset, dtype=torch.float32, device=device)


def nf4_linear(
    x: torch.Tensor,
    codes: torch.Tensor | None,
    state: Any,
    bias: torch.Tensor | None,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """`bitsandbytes.matmul_4bit`: x (…, in) with `state.shape` (out, in) to (…, out)."""
    _require_bound(codes, state)
    inputs = x.to(compute_dtype)
    if bias is not None:
        bias = bias.to(compute_dtype)
    if x.device.type == "cpu":
        weight = dequantise(codes, state).to(compute_dtype)
        return torch.nn.functional.linear(inputs, weight, bias).to(x.dtype)
    import bitsandbytes

    product: torch.Tensor = bitsandbytes.matmul_4bit(inputs, codes, state, bias=bias)
    return product.to(x.dtype)


def _require_bound(codes: torch.Tensor | None, state: Any) -> None:
    if codes is None or state is None:
        raise RuntimeError("a streamed linear layer ran before its weights were bound to it")


def dequantise(codes: torch.Tensor | None, state: Any) -> torch.Tensor:
    """The weight (out, in) in the state's dtype, on the codes' device.

    bitsandbytes' AVX512 kernel restarts blocks at each row, which is wrong where `in` is no
    multiple of the block size; seen as one long row, the weight comes out right on every CPU.
    """
    _require_bound(codes, state)
    shape = state.shape
    if codes is not None and codes.device.type == "cpu":
        state.shape = torch.Size((1, shape.numel()))
    try:
        weight: torch.Tensor = functional().dequantize_4bit(codes, state)
    finally:
        state.shape = shape
    return weight.view(shape)
