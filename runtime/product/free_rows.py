"""How many rows a pass computes in the time for which it waits for its weights anyway."""

from __future__ import annotations

import statistics
import time

import torch

from layerpack.libraries.bitsandbytes_api import dequantise, functional
from layerpack.runtime.product.ways import Product

COUNTS = (256, 128, 64, 32, 16)
_MOST_COLUMNS = 4096
_SPARE = 0.9  # of the pass: attention, norms and lm_head are beside the products


def free_rows(
    way: Product,
    shape: tuple[int, int],
    *,
    num_parameters: int,
    device: torch.device,
    dtype: torch.dtype,
    pass_s: float,
) -> int:
    """The most of `COUNTS` that fit beside the weights of a pass that takes `pass_s` to bring.

    Decoding a weight of `shape` (out, in) and multiplying with it are timed here, and stand for all
    of the model's parameters. At least the least of them; waits for the device.
    """
    columns = min(shape[0], _MOST_COLUMNS)
    weight = torch.randn((columns, shape[1]), dtype=dtype, device=device)
    codes, state = functional().quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    share = columns * shape[1] / num_parameters
    decode_s = _timed(lambda: dequantise(codes, state), device) / share
    for count in COUNTS:
        x = torch.randn((count, shape[1]), dtype=dtype, device=device)
        product_s = _timed(lambda x=x: way.multiply(x, weight, None), device) / share
        if decode_s + product_s <= max(_SPARE * pass_s, 1.05 * decode_s):
            return count
    return COUNTS[-1]


def _timed(work: object, device: torch.device) -> float:
    """Seconds of one call, the first one left out: the median of three."""
    assert callable(work)
    times_s = []
    for _ in range(4):
        _wait(device)
        begin_s = time.perf_counter()
        work()
        _wait(device)
        times_s.append(time.perf_counter() - begin_s)
    return statistics.median(times_s[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
