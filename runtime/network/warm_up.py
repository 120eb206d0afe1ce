"""CUDA's start, and the first call of each kind of kernel, beside whatever else must begin.

A context, cuBLAS, the attention library and each module of kernels are loaded when they are first
used: about a second in all, in which Python has nothing to do. Importing transformers is nothing
but Python, and takes longer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from layerpack.libraries.bitsandbytes_api import functional, nf4_linear
from layerpack.runtime.core.threads import beside

_WIDTH, _HEADS, _HEAD_DIM = 64, 4, 128
_TOKENS = (4, 1)  # as in prefill, as in decode: other kernels


@contextmanager
def warming_up(device: torch.device) -> Iterator[None]:
    """In the block `device` gets ready in a thread, which has ended after it.

    What goes wrong in there goes wrong again for whoever needs it, and is told there.
    """
    if device.type != "cuda":
        yield
        return
    job = beside("warm-up", lambda: _run(device))
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            job.wait()


def _run(device: torch.device) -> None:
    with torch.inference_mode():
        touch_kernels(device)
        torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


def touch_kernels(device: torch.device) -> None:
    """One small call of everything in a decoder layer that any thread may call first.

    Not so linear layers (see `touch_linear`).
    """
    for tokens in _TOKENS:
        x = torch.ones((1, tokens, _WIDTH), dtype=torch.bfloat16, device=device)
        x = nn.functional.silu(x) * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True))
        heads = torch.ones((1, _HEADS, tokens, _HEAD_DIM), dtype=x.dtype, device=device)
        attended = nn.functional.scaled_dot_product_attention(
            heads, heads, heads, is_causal=tokens > 1
        )
        torch.cat((attended, -heads), dim=-1)
        int(x.argmax())


@torch.inference_mode()
def touch_linear(device: torch.device) -> None:
    """One small call of both kinds of linear layer, where `device` is a GPU; for who runs passes.

    cuBLAS takes a workspace for every thread that calls it, and keeps it. bitsandbytes imports
    torch's compiler when it is first called, and two threads that import the same libraries can see
    each other's half-made modules.
    """
    if device.type != "cuda":
        return
    weight = torch.ones((_WIDTH, _WIDTH), dtype=torch.bfloat16, device=device)
    codes, state = functional().quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    for tokens in _TOKENS:
        x = torch.ones((1, tokens, _WIDTH), dtype=weight.dtype, device=device)
        nf4_linear(nn.functional.linear(x, weight), codes, state, None, weight.dtype)
