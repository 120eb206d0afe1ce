"""A network for tables of rows: transformers' forward, attention by slots, products in order.

Outside a pass it is what transformers made of it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from layerpack.libraries.transformers_api import attention_by, takes_attention_functions
from layerpack.runtime.network.attention import rows_attention
from layerpack.runtime.network.product import Arithmetic, PlainLinear, Product
from layerpack.runtime.network.rows import Rows


def why_no_rows(network: Any) -> str | None:
    """Why a network cannot run tables of rows; None if it can."""
    config = network.config.get_text_config()
    known = inspect.signature(type(network).forward).parameters
    if not takes_attention_functions(network):
        return "its attention is a function of its own"
    if "position_ids" not in known:
        return "its positions cannot be given"
    if getattr(config, "alibi", False):
        return "its attention weighs distances (ALiBi)"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share keys and values"
    if any(hasattr(module, "sinks") for module in network.modules()):
        return "its attention has sinks"
    return None


class RowNetwork:
    """A network for `step`. `product` None: its layers multiply as they do without rows."""

    def __init__(self, network: Any, arithmetic: Arithmetic, product: Product | None) -> None:
        self.network, self.product = network, product
        self.device: torch.device = network.device
        self._arithmetic = arithmetic

    @contextlib.contextmanager
    def for_rows(self, rows: Rows) -> Iterator[None]:
        """In the block a forward of the network is that of `rows`, whose tokens it gets."""
        calls: Counter[int] = Counter()

        def attend(module: Any, *tensors: Any, **how: Any) -> Any:
            # A layer may call twice, as differential attention does, with other values.
            layer = (module.layer_idx, calls[module.layer_idx])
            calls[module.layer_idx] += 1
            return rows_attention(*tensors, rows=rows, layer=layer, **how)

        with attention_by(self.network, attend):
            self._arithmetic.product = self.product
            try:
                yield
            finally:
                self._arithmetic.product = None


def use_arithmetic(network: Any, arithmetic: Arithmetic) -> None:
    """Let every linear layer of the network multiply as `arithmetic` has it."""
    for module in network.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = PlainLinear
        if hasattr(module, "arithmetic") or isinstance(module, PlainLinear):
            module.arithmetic = arithmetic
