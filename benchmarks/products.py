"""The products of a 72B's layers: bits, error and time, beside bitsandbytes' decoding and cuBLAS.

    python benchmarks/products.py [--tune] [--rows 1,16,64,256,2048]

For each weight's shape and number of rows: milliseconds of ours and of cuBLAS, medians in one run;
the error against float64 of both; whether all tiles give equal bits. Then all linear layers of a
layer, decoding included, over dequantise and cuBLAS. `--tune` times every tile of a list.
Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial

import bitsandbytes.functional as bnb
import torch
import triton
from torch.nn.functional import linear

from layerpack.runtime.product import copy_engine, in_order
from layerpack.runtime.product.tile import Tile

HIDDEN, INNER, KV = 8192, 29568, 1024
SHAPES = {
    "q": (HIDDEN, HIDDEN),
    "k": (KV, HIDDEN),
    "gate": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
IN_A_LAYER = {"q": 2, "k": 2, "gate": 2, "down": 1}
CUDA = torch.device("cuda")


def tiles(num_rows: int) -> Iterator[tuple[str, Tile]]:
    """What might be fastest for so many rows."""
    if num_rows <= 16:
        cuts = itertools.product((16,), (16, 32, 64), (128, 256), (4,), (3, 5))
    elif num_rows <= 64:
        cuts = itertools.product((64,), (32, 64, 128), (64, 128), (4, 8), (3, 5))
    elif num_rows <= 256:
        cuts = itertools.product((64, 128), (64, 128, 256), (64,), (4, 8), (3, 4))
    else:
        cuts = itertools.product((128, 256), (128, 256), (64,), (4, 8), (3, 4))
    for rows, columns, depth, warps, stages in cuts:
        if 2 * (rows + columns) * depth * stages > 225_000 or rows * columns > 256 * 32 * warps:
            continue
        tile = Tile(rows=rows, columns=columns, depth=depth, warps=warps, stages=stages)
        yield "pointers", tile
        if num_rows >= 128 and columns >= 128:
            yield "tma", tile


def run(kind: str, x: torch.Tensor, weight: torch.Tensor, tile: Tile) -> torch.Tensor:
    """One product, with the copy engine or without."""
    if kind == "pointers":
        return in_order.product(x, weight, None, tile)
    out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    cores = torch.cuda.get_device_properties(CUDA).multi_processor_count
    programs = min(tile.count(*out.shape), cores)
    return copy_engine.product(x, weight, None, out, tile, programs)


def timed(work: Callable[[], object]) -> float:
    """Milliseconds, median."""
    return float(triton.testing.do_bench(work, warmup=5, rep=30, return_mode="median"))


def tune(num_rows: int, name: str) -> None:
    """Every tile; the best few."""
    weight = torch.randn(SHAPES[name], device=CUDA, dtype=torch.bfloat16) * 0.02
    x = torch.randn((num_rows, SHAPES[name][1]), device=CUDA, dtype=torch.bfloat16)
    wanted = in_order.product(x, weight, None)
    found: list[tuple[float, str]] = []
    unequal = 0
    for kind, tile in tiles(num_rows):
        work = partial(run, kind, x, weight, tile)
        cut = f"{kind} {(tile.rows, tile.columns, tile.depth, tile.warps, tile.stages)}"
        try:
            unequal += not torch.equal(work(), wanted)
            found.append((timed(work), cut))
        except Exception as reason:  # too much shared memory, or what Triton cannot do
            print(f"   {cut}: {type(reason).__name__} {str(reason)[:60]}")
    cublas = timed(partial(linear, x, weight))
    print(f"{name} {num_rows} rows: cuBLAS {cublas:.3f} ms; {unequal} of {len(found)} unequal")
    for ms, cut in sorted(found)[:4]:
        print(f"   {ms:.3f} ms ({ms / cublas:.2f}) {cut}", flush=True)


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """||out - exact|| / ||exact||."""
    return float((out.double() - exact).norm() / exact.norm())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,16,64,256,2048")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    options = parser.parse_args()
    counts = [int(count) for count in options.rows.split(",")]
    names = options.shapes.split(",")
    torch.manual_seed(0)
    if options.tune:
        for count, name in itertools.product(counts, names):
            tune(count, name)
        return
    result: dict[str, dict[str, float]] = {}
    layer: dict[int, list[float]] = {count: [0.0, 0.0] for count in counts}
    for name in names:
        shape = SHAPES[name]
        weight = torch.randn(shape, device=CUDA, dtype=torch.bfloat16) * 0.02
        codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        decode = timed(partial(bnb.dequantize_4bit, codes, state))
        weight = bnb.dequantize_4bit(codes, state)
        x = torch.randn((max(counts), shape[1]), device=CUDA, dtype=torch.bfloat16)
        whole = in_order.product(x, weight, None)
        for count in counts:
            some = x[:count]
            ours = timed(partial(in_order.product, some, weight, None))
            cublas = timed(partial(linear, some, weight))
            out = in_order.product(some, weight, None)
            few = min(count, 16)
            exact = some[:few].double() @ weight.double().t()
            row = {
                "ms": ours,
                "cuBLAS ms": cublas,
                "decode ms": decode,
                "over, decoding included": (ours + decode) / (cublas + decode),
                "error": relative_error(out[:few], exact),
                "cuBLAS error": relative_error(linear(some, weight)[:few], exact),
                "equal": float(torch.equal(out, whole[:count])),
            }
            if count <= 4:
                fused = torch.cat([_one_row(r, codes, state) for r in some.split(1)])
                row["one-row kernel error"] = relative_error(fused[:few], exact)
            result[f"{name} {count}"] = row
            layer[count][0] += IN_A_LAYER[name] * (ours + decode)
            layer[count][1] += IN_A_LAYER[name] * (cublas + decode)
            print(name, count, {key: round(value, 5) for key, value in row.items()}, flush=True)
    over = {count: round(ours / theirs, 3) for count, (ours, theirs) in layer.items()}
    print(json.dumps({"device": torch.cuda.get_device_name(), "layer over": over, "all": result}))


def _one_row(x: torch.Tensor, codes: torch.Tensor, state: object) -> torch.Tensor:
    import bitsandbytes

    out: torch.Tensor = bitsandbytes.matmul_4bit(x, codes, state)
    return out


if __name__ == "__main__":
    main()
