"""lm_head by row ranges, which take turns in the slots that layers use: no matrix that stays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from layerpack.formats.blob import nf4
from layerpack.formats.blob.nf4 import Nf4State
from layerpack.formats.manifest.facts import Blob
from layerpack.formats.pack import Pack
from layerpack.libraries.bitsandbytes_api import (
    dequantise,
    nf4_linear,
    offset_tensor,
    quant_state,
)
from layerpack.libraries.dtypes import TORCH_DTYPES
from layerpack.runtime.core.slices import Slice, head_weight
from layerpack.runtime.product.ways import Arithmetic
from layerpack.runtime.stream.memory_tier import tensor_bytes

SliceContext = Callable[[int], contextlib.AbstractContextManager[torch.Tensor]]
"""`with use(index) as storage:` the slice's bytes (uint8) on the compute device."""


class SlicedHead(nn.Module):
    """Input (…, hidden), output (…, vocabulary)."""

    def __init__(
        self,
        *,
        pack: Pack,
        slices: Sequence[Slice],
        use: SliceContext,
        bias: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        blob, weight, num_rows = head_weight(pack)
        self.out_features = num_rows
        self.bias = bias
        self._slices = tuple(slices)
        self._use = use
        self._dtype = TORCH_DTYPES[pack.manifest.model.dtype]
        # Made once: a state's offset is a copy to the device, for which the host would wait.
        self._states: dict[int, Any] = {}
        self.arithmetic = Arithmetic()
        if (state := blob.nf4.get(weight.name)) is not None:
            self.in_features = state.shape[1]
            constants = _constants(pack, blob, weight.name, device)
            offset = offset_tensor(state, device)
            for part in slices:
                assert part.rows is not None
                self._states[part.index] = _rows_state(state, constants, offset, part.rows)
        else:
            self.in_features = weight.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits in the input's dtype."""
        if len(self._slices) == 1:
            with self._use(self._slices[0].index) as storage:
                return self.rows(x, storage, self._slices[0], self.bias)
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype, device=x.device)
        for part in self._slices:
            assert part.rows is not None
            first, last = part.rows
            bias = None if self.bias is None else self.bias[first:last]
            with self._use(part.index) as storage:
                out[..., first:last] = self.rows(x, storage, part, bias)
        return out

    def rows(
        self, x: torch.Tensor, storage: torch.Tensor, part: Slice, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits (…, rows of `part`) from the slice's bytes."""
        raw = storage[: part.length_bytes]
        state = self._states.get(part.index)
        in_order = self.arithmetic.takes(x)
        if state is not None and not in_order:
            return nf4_linear(x, raw.view(-1, 1), state, bias, self._dtype)
        if state is None:
            weight = raw.view(self._dtype).view(-1, self.in_features)
        else:
            weight = dequantise(raw.view(-1, 1), state).to(self._dtype)
        if in_order:
            return self.arithmetic.multiply(x, weight, bias)
        return nn.functional.linear(x, weight, bias)


def _constants(pack: Pack, blob: Blob, name: str, device: torch.device) -> dict[str, torch.Tensor]:
    constants = {}
    for suffix in (nf4.ABSMAX, nf4.QUANT_MAP, nf4.NESTED_ABSMAX, nf4.NESTED_QUANT_MAP):
        entry = next((e for e in blob.tensors if e.name == name + suffix), None)
        if entry is not None:
            raw = tensor_bytes(pack, blob, entry)
            # A clone is aligned to its element, wherever the bytes lay in the file.
            constants[suffix] = raw.clone().view(TORCH_DTYPES[entry.dtype]).to(device)
    return constants


def _rows_state(
    state: Nf4State,
    constants: dict[str, torch.Tensor],
    offset: torch.Tensor | None,
    rows: tuple[int, int],
) -> Any:
    """The QuantState of a row range; it begins on a block and, if nested, on a nested block."""
    in_features = state.shape[1]
    first = rows[0] * in_features // state.block_size
    last = nf4.num_blocks((rows[1], in_features), state.block_size)

    def part(suffix: str) -> torch.Tensor:
        whole = constants[suffix]
        if suffix == nf4.ABSMAX:
            return whole[first:last]
        if suffix == nf4.NESTED_ABSMAX:
            nested = nf4.NESTED_BLOCK_SIZE
            return whole[first // nested : -(-last // nested)]
        return whole

    result = quant_state(state, part)
    result.shape = torch.Size((rows[1] - rows[0], in_features))
    result.offset = offset
    return result
