"""Linear layers whose weights are wherever the stream has put them.

They compute what `bitsandbytes.nn.Linear4bit` computes from the same bytes, so a streamed model's
output is that of transformers with bitsandbytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerpack.libraries.bitsandbytes_api import dequantise_on_cpu, nf4_linear

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
        if not self._keeps or x.device.type != "cpu":
            return nf4_linear(x, self.codes, self.state, bias, self.compute_dtype)
        if self._decoded is None:
            self._decoded = dequantise_on_cpu(self.codes, self.state).to(self.compute_dtype)
        inputs = x.to(self.compute_dtype)
        bias = bias if bias is None else bias.to(self.compute_dtype)
        return nn.functional.linear(inputs, self._decoded, bias).to(x.dtype)
