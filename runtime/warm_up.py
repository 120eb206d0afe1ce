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


@contextmanager
def warming_up(device: torch.device) -> Iterator[None]:
    """In the block `device` gets ready in a thread of its own, which has ended after it.

    What goes wrong in there goes wrong again for whoever needs it, and is told there.
    """
    if device.type != "cuda":
        yield
        return
    bitsandbytes_functional()  # not in the thread: importing it swaps a function of torch
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
    """One small call of everything that a decoder layer consists of, as prefill and as decode."""
    functional = bitsandbytes_functional()
    weight = torch.ones((_WIDTH, _WIDTH), dtype=torch.bfloat16, device=device)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    for tokens in (4, 1):
        x = torch.ones((1, tokens, _WIDTH), dtype=weight.dtype, device=device)
        x = nf4_linear(x, codes, state, None, weight.dtype)
        x = nn.functional.linear(x, weight)
        x = nn.functional.silu(x) * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True))
        heads = torch.ones((1, _HEADS, tokens, _HEAD_DIM), dtype=weight.dtype, device=device)
        attended = nn.functional.scaled_dot_product_attention(
            heads, heads, heads, is_causal=tokens > 1
        )
        torch.cat((attended, -heads), dim=-1)
        int(x.argmax())
