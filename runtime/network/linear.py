"""Linear layers whose weights are wherever the stream has put them.

They compute what `bitsandbytes.nn.Linear4bit` computes from the same bytes, so a streamed model's
output is that of transformers with bitsandbytes; in a pass of rows they decode as it does, and
multiply in an order of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerpack.libraries.bitsandbytes_api import dequantise, nf4_linear
from layerpack.runtime.product.ways import Arithmetic

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


class Nf4Linear(nn.Module):
    """x @ W.T + b with W in NF4: `codes` (n, 1) uint8 and `state` are set before each forward.

    Input (…, in_features), output (…, out_features), in the input's dtype.
    """

    def __init__(self, *, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = dtype
        self.arithmetic = Arithmetic()
        self.register_parameter("bias", None)
        self.codes: torch.Tensor | None = None
        self.state: QuantState | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Decode and multiply."""
        bias: Any = self.bias
        if not self.arithmetic.takes(x):
            return nf4_linear(x, self.codes, self.state, bias, self.compute_dtype)
        weight = dequantise(self.codes, self.state).to(self.compute_dtype)
        return self.arithmetic.multiply(x, weight, bias)
