"""x @ W.T such that a row's bits depend on the row alone, by the fastest way that this device has.

Each way is tried on random rows, in random places and numbers, before it is used: `pick_product`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch
from torch.nn.functional import linear, pad

from layerpack.runtime.measure.remembered import load_links, store_links

Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x (rows, in), weight (out, in), bias (out) or None to (rows, out)."""
_COUNTS = (1, 2, 3, 7, 16, 17, 40, 64, 100)
_MOST_BYTES = {"cuda": 256 << 20, "cpu": 1 << 22}
"""Of a weight that is tried: a kernel goes by K, on a GPU also by whether columns are many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A way to multiply. `name` is for people."""

    name: str
    multiply: Multiply


class Arithmetic:
    """What the linear layers of one network multiply with, now. None: bitsandbytes' own products.

    `lone_rows_in_kernel`: a single row is decoded and multiplied in one kernel, with other bits.
    """

    def __init__(self) -> None:
        self.product: Product | None = None
        self.lone_rows_in_kernel = False

    def takes(self, x: torch.Tensor) -> bool:
        """Whether this input (…, in) is for `product`."""
        if self.product is None:
            return False
        return not (self.lone_rows_in_kernel and x.numel() == x.shape[-1])

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x (…, in) in any type to (…, out) in x's, computed in the weight's."""
        assert self.product is not None
        inputs = x.to(weight.dtype).reshape(-1, x.shape[-1])
        bias = bias if bias is None else bias.to(weight.dtype)
        out = self.product.multiply(inputs, weight, bias)
        return out.view(*x.shape[:-1], -1).to(x.dtype)


class PlainLinear(torch.nn.Linear):
    """A linear layer in 16 bits that multiplies as `arithmetic` has it."""

    arithmetic: Arithmetic

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) to (…, out)."""
        if self.arithmetic.takes(x):
            return self.arithmetic.multiply(x, self.weight, self.bias)
        return super().forward(x)


def pick_product(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]
) -> Product:
    """The first way that gives equal bits for all of these shapes (out, in) of weights.

    What was found for a GPU is remembered, for this card and these versions.
    """
    return _pick(device, dtype, tuple(sorted(set(shapes))))


@functools.cache
def _pick(device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]) -> Product:
    if device.type == "cpu":
        return _first_right(device, dtype, shapes)
    card = torch.cuda.get_device_name(device)
    key = f"{card}, torch {torch.__version__}, layerpack {version('layerpack')}, {dtype}, {shapes}"
    known = load_links()
    named = {way.name: way for way in (*ways(device, dtype), ONE_BY_ONE)}
    way = named.get(known.products.get(key, ""))
    if way is None:
        way = _first_right(device, dtype, shapes)
        store_links(replace(known, products={**known.products, key: way.name}))
    return way


def _first_right(
    device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]
) -> Product:
    for way in ways(device, dtype):
        if all(gives_equal_bits(way, device, dtype, shape) for shape in shapes):
            return way
    return ONE_BY_ONE


def ways(device: torch.device, dtype: torch.dtype) -> Iterator[Product]:
    """From the fastest to the surest."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        try:
            from layerpack.runtime.product.in_order import product
        except ImportError:
            pass
        else:
            yield Product(name="in order of K", multiply=product)
    if device.type == "cpu":
        yield Product(name="at least 4 rows at a time", multiply=_padded)
    yield Product(name="64 rows at a time", multiply=_in_blocks)


def _padded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A matrix product of its own is used for a single vector; from few rows on it is one."""
    missing = 4 - x.shape[0]
    if missing <= 0:
        return linear(x, weight, bias)
    return linear(pad(x, (0, 0, 0, missing)), weight, bias)[: x.shape[0]]


def _in_blocks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    count = x.shape[0]
    whole = pad(x, (0, 0, 0, -count % 64))
    return torch.cat([linear(part, weight, bias) for part in whole.split(64)])[:count]


def _one_by_one(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.cat([linear(row, weight, bias) for row in x.split(1)])


ONE_BY_ONE = Product(name="one row after the other", multiply=_one_by_one)


def gives_equal_bits(
    way: Product, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]
) -> bool:
    """Whether rows come out the same in other places, numbers and company."""
    columns = min(shape[0], max(64, _MOST_BYTES[device.type] // (shape[1] * dtype.itemsize)))
    chance = torch.Generator(device).manual_seed(columns + shape[1])

    def draw(rows: int, spread: float) -> torch.Tensor:
        empty = torch.empty((rows, shape[1]), device=device, dtype=dtype)
        return empty.normal_(0, spread, generator=chance)

    weight, rows = draw(columns, shape[1] ** -0.5), draw(max(_COUNTS), 1.0)
    wanted = way.multiply(rows, weight, None)
    for count in _COUNTS:
        order = torch.randperm(len(rows), generator=chance, device=device)[:count]
        if not torch.equal(way.multiply(rows[order], weight, None), wanted[order]):
            return False
    return True
