"""From NF4 back to numbers: what bitsandbytes' `dequantize_4bit` gives, bit for bit, on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from layerpack.formats.blob import nf4
from layerpack.libraries.dtypes import TORCH_DTYPES


class Nf4Decoder:
    """One quantised weight, any range of its elements at a time.

    `read` gives the stored part of a suffix ("" for the codes, nf4.ABSMAX …), of any shape. Holds
    the codes, and the scales in float32; elements are decoded when asked for.
    """

    def __init__(self, state: nf4.Nf4State, read: Callable[[str], torch.Tensor]) -> None:
        self._state = state
        self._codes = read("").reshape(-1)
        self._pairs = _pairs(read(nf4.QUANT_MAP).reshape(-1))
        absmax = read(nf4.ABSMAX).reshape(-1)
        if state.nested_offset is not None:
            absmax = read(nf4.NESTED_QUANT_MAP).reshape(-1)[absmax.int()]
            nested = read(nf4.NESTED_ABSMAX).reshape(-1)
            absmax *= nested.repeat_interleave(nf4.NESTED_BLOCK_SIZE)[: absmax.numel()]
            absmax += torch.tensor(state.nested_offset, dtype=torch.float32)
        self._absmax = absmax

    def elements(self, begin: int, end: int) -> torch.Tensor:
        """Elements [begin, end) of the weight, row-major, flat, in the state's dtype."""
        size = self._state.block_size
        values = self._pairs[self._codes[begin // 2 : -(-end // 2)].int()].view(-1)
        values = values[begin % 2 :][: end - begin]
        scales = self._absmax[begin // size : -(-end // size)].repeat_interleave(size)
        scales = scales[begin % size :][: end - begin]
        return (values * scales).to(TORCH_DTYPES[self._state.dtype])


def _pairs(quant_map: torch.Tensor) -> torch.Tensor:
    """(256, 2): the two values that each byte of codes stands for."""
    byte = torch.arange(256)
    return torch.stack([quant_map[byte >> 4], quant_map[byte & 15]], dim=1)
