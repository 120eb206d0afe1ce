"""The references that everything is held against: transformers and bitsandbytes themselves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn


def quantised_reference(pack: Path, device: str = "cpu") -> Any:
    """transformers' own model, loading the pack as the pre-quantised checkpoint that it is.

    On a CPU two faults of bitsandbytes are kept out: the repacking of weights in place, which
    computes with other numbers, and the wrong decoding of rows that are no multiple of the block
    size (its AVX512 kernel restarts blocks at each row), for which a weight is seen as one row.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes as bnb
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(pack, device_map={"": device}).eval()
    if device != "cpu":
        return model
    for name, module in list(model.named_modules()):
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        module.support_avx512bf16_for_cpu = False
        state = module.weight.quant_state
        if state.shape[1] % state.blocksize:
            model.set_submodule(name, dense_linear(module))
    return model


def dense_linear(module: Any) -> nn.Linear:
    """The same of a Linear4bit, with the weight that its codes stand for."""
    from bitsandbytes import functional

    state = module.weight.quant_state
    shape = state.shape
    state.shape = torch.Size((1, shape.numel()))
    weight = functional.dequantize_4bit(module.weight.data.view(-1, 1), state).view(shape)
    linear = nn.Linear(shape[1], shape[0], bias=module.bias is not None, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = module.bias
    return linear
