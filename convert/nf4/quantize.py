"""One weight to NF4: codes, absmax (themselves quantised, by choice) and state, ready to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from layerpack.convert.nf4.blocks import encode_blocks
from layerpack.convert.nf4.double_quant import nest_absmax, nested_map
from layerpack.convert.nf4.torch_threads import one_torch_thread
from layerpack.formats.blob import nf4
from layerpack.formats.errors import SourceError
from layerpack.libraries.dtypes import SAFETENSORS_DTYPES

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Weight:
    """A quantised weight. `tensors` by suffix: "" for the codes, nf4.ABSMAX and so on.

    The codes are not among them if they went their own way (`finish_nf4`).
    """

    state: nf4.Nf4State
    tensors: Mapping[str, torch.Tensor]

    def part(self, suffix: str) -> memoryview:
        """The bytes of one part, without a copy. The state's JSON is not among them."""
        return self.tensors[suffix].numpy().data.cast("B")


def quantize_nf4(
    weight: torch.Tensor,
    *,
    name: str,
    block_size: int = 64,
    double_quant: bool = True,
    device: torch.device,
    num_workers: int | None = None,
) -> Nf4Weight:
    """Quantise a float weight of 16 or 32 bits on `device`; `num_workers` None: all that help.

    Codes and absmax are those of bitsandbytes' `quantize_4bit` on a CPU, on every device. Memory
    beyond the result: see `encode_blocks`. Raises SourceError, with the tensor's `name`, if the
    weight holds NaN or infinity.
    """
    if weight.dtype not in _DTYPES or block_size not in nf4.BLOCK_SIZES or not weight.numel():
        raise ValueError(
            f"{name}: {weight.dtype}, {weight.numel()} elements, blocks of {block_size}"
        )
    codes, absmax = encode_blocks(
        weight, block_size=block_size, device=device, num_workers=num_workers
    )
    check_absmax(absmax, name=name)
    with one_torch_thread():
        rest = finish_nf4(
            absmax,
            shape=tuple(weight.shape),
            dtype=SAFETENSORS_DTYPES[weight.dtype],
            block_size=block_size,
            double_quant=double_quant,
        )
    return Nf4Weight(state=rest.state, tensors={"": codes, **rest.tensors})


def check_absmax(absmax: torch.Tensor, *, name: str) -> None:
    """Raises SourceError, with the tensor's `name`, if a block holds NaN or infinity."""
    if not torch.isfinite(absmax).all():
        raise SourceError(
            f"tensor {name} holds NaN or infinite values, which cannot be quantised; "
            "the checkpoint is damaged: download it again or mend it"
        )


def finish_nf4(
    absmax: torch.Tensor,
    *,
    shape: tuple[int, ...],
    dtype: str,
    block_size: int,
    double_quant: bool,
) -> Nf4Weight:
    """All of a weight but its codes, from the absmax (float32) of all its blocks.

    `shape` and `dtype` (a safetensors name) are the weight's.
    """
    tensors = {nf4.QUANT_MAP: torch.tensor(nf4.NF4_CODES, dtype=torch.float32)}
    offset = None
    if double_quant:
        tensors[nf4.ABSMAX], tensors[nf4.NESTED_ABSMAX], offset = nest_absmax(absmax)
        tensors[nf4.NESTED_QUANT_MAP] = nested_map()
    else:
        tensors[nf4.ABSMAX] = absmax
    state = nf4.Nf4State(shape=shape, block_size=block_size, dtype=dtype, nested_offset=offset)
    return Nf4Weight(state=state, tensors=tensors)
