"""CUDA's start, and the first call of each kind of kernel, beside whatever else must begin.

A context, cuBLAS, the attention library and each module of kernels are loaded when they are first
used: about a second in all, in which Python has nothing to do. Importing transformers is nothing
but Python, and takes longer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from layerpack.runtime.linear import bitsandbytes_functional, nf4_linear

_WIDTH, _HEADS, _HEAD_DIM = 64, 4, 128
_TOKENS = (4, 1)  # as in prefill, as in decode: other kernels


@contextmanager
def warming_up(device: torch.device) -> Iterator[None]:
    """In the block torch's part of `device` gets ready in a thread, which has ended after it.

    What goes wrong in there goes wrong again for whoever needs it, and is told there. The thread
    imports nothing: two that import the same libraries see each other's half-made modules.
    """
    if device.type != "cuda":
        yield
        return
    thread = threading.Thread(target=_run, args=(device,), name="layerpack-warm-up", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _run(device: torch.device) -> None:
    try:
        with torch.inference_mode():
            touch_kernels(device)
            torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception:  # see above
        return


def touch_kernels(device: torch.device) -> None:
    """One small call of everything in a decoder layer that is torch's own."""
    weight = torch.ones((_WIDTH, _WIDTH), dtype=torch.bfloat16, device=device)
    for tokens in _TOKENS:
        x = torch.ones((1, tokens, _WIDTH), dtype=weight.dtype, device=device)
        x = nn.functional.linear(x, weight)
        x = nn.functional.silu(x) * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True))
        heads = torch.ones((1, _HEADS, tokens, _HEAD_DIM), dtype=weight.dtype, device=device)
        attended = nn.functional.scaled_dot_product_attention(
            heads, heads, heads, is_causal=tokens > 1
        )
        torch.cat((attended, -heads), dim=-1)
        int(x.argmax())


@torch.inference_mode()
def touch_nf4(device: torch.device) -> None:
    """One small call of bitsandbytes' kernels, where `device` is a GPU.

    Imports torch's compiler, if that has not happened: for a second or more, and not beside
    another import (see `warming_up`).
    """
    if device.type != "cuda":
        return
    weight = torch.ones((_WIDTH, _WIDTH), dtype=torch.bfloat16, device=device)
    codes, state = bitsandbytes_functional().quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True
    )
    for tokens in _TOKENS:
        x = torch.ones((1, tokens, _WIDTH), dtype=weight.dtype, device=device)
        nf4_linear(x, codes, state, None, weight.dtype)
