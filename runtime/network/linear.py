"""Linear layers whose weights are wherever the stream has put them.

Both compute what `bitsandbytes.nn.Linear4bit` computes from the same bytes, so a streamed model's
output is that of transformers with bitsandbytes.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


def bitsandbytes_functional() -> Any:
    """`bitsandbytes.functional`, imported without its notice about an optional CPU kernel."""
    if "bitsandbytes" in sys.modules:
        import bitsandbytes.functional

        return bitsandbytes.functional
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # It wraps two fallback kernels, which nothing here uses, with torch.compile. That alone
    # imports torch's whole compiler, which takes longer than all else of it: seconds.
    compiler = torch.compile
    torch.compile = _uncompiled  # type: ignore[assignment]
    try:
        import bitsandbytes.functional
    finally:
        torch.compile = compiler
    return bitsandbytes.functional


def _uncompiled(function: Any = None, **_: Any) -> Any:
    """torch.compile's two ways of being called, without compiling."""
    return _uncompiled if function is None else function


class Nf4Linear(nn.Module):
    """x @ W.T + b with W in NF4: `codes` (n, 1) uint8 and `state` are set before each forward.

    Input (…, in_features), output (…, out_features), in the input's dtype.
    """

    def __init__(self, *, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = dtype
        self.register_parameter("bias", None)
        self.codes: torch.Tensor | None = None
        self.state: QuantState | None = None
        self._keeps = False
        self._decoded: torch.Tensor | None = None

    def keep_decoded(self, keep: bool) -> None:
        """From here on decode once for several forwards, or let go. Matters on a CPU only."""
        self._keeps, self._decoded = keep, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Decode and multiply; on CUDA in one kernel for few tokens."""
        bias: Any = self.bias
        if self._keeps and x.device.type == "cpu":
            if self._decoded is None:
                self._decoded = dequantise_on_cpu(self.codes, self.state)
            inputs = x.to(self.compute_dtype)
            bias = bias if bias is None else bias.to(self.compute_dtype)
            return nn.functional.linear(inputs, self._decoded, bias).to(x.dtype)
        return nf4_linear(x, self.codes, self.state, bias, self.compute_dtype)


def nf4_linear(
    x: torch.Tensor,
    codes: torch.Tensor | None,
    state: Any,
    bias: torch.Tensor | None,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """`bitsandbytes.matmul_4bit`, with `state.shape` (out_features, in_features)."""
    if codes is None or state is None:
        raise RuntimeError("a streamed linear layer ran before its weights were bound to it")
    inputs = x.to(compute_dtype)
    if bias is not None:
        bias = bias.to(compute_dtype)
    if x.device.type == "cpu":
        return nn.functional.linear(inputs, dequantise_on_cpu(codes, state), bias).to(x.dtype)
    import bitsandbytes

    product: torch.Tensor = bitsandbytes.matmul_4bit(inputs, codes, state, bias=bias)
    return product.to(x.dtype)


def dequantise_on_cpu(codes: torch.Tensor | None, state: Any) -> torch.Tensor:
    """The weight (out_features, in_features) in the state's dtype.

    bitsandbytes' AVX512 kernel restarts blocks at each row, which is wrong where in_features is no
    multiple of the block size; seen as one long row, the weight comes out right on every CPU.
    """
    shape = state.shape
    state.shape = torch.Size((1, shape.numel()))
    try:
        weight: torch.Tensor = bitsandbytes_functional().dequantize_4bit(codes, state)
    finally:
        state.shape = shape
    return weight.view(shape)
