"""Checking proposed tokens with the very arithmetic of plain decoding.

A pass of several tokens rounds otherwise than passes of one (other kernels, other orders of
summing up), so where two tokens are as likely as each other to bf16's eight bits, which is not
rare, the text would branch. Here each layer, once its weights have arrived, takes the tokens one
after the other, as if each had a pass of its own: the weights still travel once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layerpack.runtime.network.head import SlicedHead
from layerpack.runtime.network.linear import Nf4Linear


@contextmanager
def token_by_token(network: Any, layers_path: str) -> Iterator[None]:
    """Within the block a pass of several tokens gives what as many passes of one would, bit by bit.

    For batches of one sequence without padding. Layers of a model with a sliding window take all
    tokens at once as soon as the sequence is longer than the window.
    """
    owner = network.get_submodule(layers_path.rpartition(".")[0])
    layers = network.get_submodule(layers_path)
    window = getattr(network.config.get_text_config(), "sliding_window", None)
    embedding = network.get_input_embeddings()
    patched: list[tuple[Any, str]] = []

    def patch(target: Any, name: str, function: Callable[..., Any]) -> None:
        setattr(target, name, function)  # shadows the method, on this object alone
        patched.append((target, name))

    try:
        for layer in layers:
            patch(layer, "forward", _decoded_once(layer, _one_by_one(layer.forward, window)))
        for module in owner.children():
            if module is not layers and module is not embedding:
                patch(module, "forward", _one_by_one(module.forward, window))
        head = network.get_output_embeddings()
        if isinstance(head, SlicedHead):
            patch(head, "rows", _one_by_one(head.rows, window))
        yield
    finally:
        for target, name in patched:
            delattr(target, name)


def _one_by_one(function: Callable[..., Any], window: int | None) -> Callable[..., Any]:
    """`function` over (1, tokens, …) as calls of one token each, their results put together."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        count = tensors[0].shape[1]
        # Keys that lie beyond the window are masked, and a single token would not know how.
        seen = max((tensor.shape[3] for tensor in tensors if _is_mask(tensor, count)), default=0)
        if count == 1 or (window is not None and seen > window):
            return function(*args, **kwargs)
        rows = [
            function(
                *(_row(value, place, count) for value in args),
                **{name: _row(value, place, count) for name, value in kwargs.items()},
            )
            for place in range(count)
        ]
        return _joined(rows)

    return call


def _is_mask(tensor: torch.Tensor, count: int) -> bool:
    """Whether it is an attention mask, (1, 1, tokens, keys)."""
    return tensor.ndim == 4 and tuple(tensor.shape[:3]) == (1, 1, count)


def _row(value: Any, place: int, count: int) -> Any:
    """What the call for the token at `place` of `count` gets in place of `value`."""
    if isinstance(value, tuple):
        return tuple(_row(part, place, count) for part in value)
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    if _is_mask(value, count):
        # The token comes last in the cache and sees all of it. Plain decoding has no mask then,
        # and one that hides nothing would choose another attention kernel.
        return None
    return value[:, place : place + 1] if value.shape[1] == count else value


def _joined(rows: list[Any]) -> Any:
    first = rows[0]
    if isinstance(first, tuple):
        return tuple(_joined(list(column)) for column in zip(*rows, strict=True))
    return torch.cat(rows, dim=1) if isinstance(first, torch.Tensor) else rows[-1]


def _decoded_once(layer: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the layer's weights decoded once for all tokens, where that is a step."""
    linears = [module for module in layer.modules() if isinstance(module, Nf4Linear)]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for linear in linears:
            linear.keep_decoded(True)
        try:
            return function(*args, **kwargs)
        finally:
            for linear in linears:
                linear.keep_decoded(False)

    return call
