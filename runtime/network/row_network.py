"""A network for tables of rows: transformers' forward, attention by slots, products in order.

Outside a pass it is what transformers made of it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from layerpack.libraries.torch_api import empty_cublas_workspaces
from layerpack.libraries.transformers_api import attention_by, takes_attention_functions
from layerpack.libraries.transformers_rope import Rope
from layerpack.runtime.kv.slots import KvSlots
from layerpack.runtime.network.attention import rows_attention
from layerpack.runtime.network.graphs import Graphs, can_be_recorded
from layerpack.runtime.network.rows import Part, Rows, sizes_of, table_of_rows
from layerpack.runtime.product.ways import Arithmetic, PlainLinear, Product


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
    """A network for `step`, and its KV slots.

    `product` None: its layers multiply as they do without rows. `resident`: all of it is in VRAM
    for good, so that passes of few rows may be recorded. Where bits are equal, passes of fewer than
    `least_rows` are filled up.
    """

    def __init__(
        self,
        network: Any,
        arithmetic: Arithmetic,
        product: Product | None,
        *,
        resident: bool = False,
        least_rows: int = 1,
    ) -> None:
        self.network, self.product, self._least_rows = network, product, least_rows
        self.device: torch.device = network.device
        self.kv = KvSlots(0, self.device)
        self._arithmetic = arithmetic
        self.follows_length = Rope(network).follows_length
        """Whether rotary embeddings follow the length of the one sequence that is run."""
        self._may_record = resident and self.device.type == "cuda" and can_be_recorded(network)
        self._graphs: Graphs | None = None

    @property
    def has_equal_bits(self) -> bool:
        """Whether a row's bits depend on the tokens that it sees alone."""
        return self.product is not None and not self._arithmetic.lone_rows_in_kernel

    def reserve(self, num_slots: int) -> KvSlots:
        """At least so many free slots, for one who is alone with the network."""
        if self.kv.num_free < num_slots:
            self._graphs = None
            self.kv = KvSlots(0, self.device)  # the old ones go first
            self.kv = KvSlots(num_slots, self.device)
            if self._may_record:
                self._graphs = Graphs(self.kv, self.device, self._forward)
        return self.kv

    def close(self) -> None:
        """Let go of the slots and of what was recorded over them."""
        if self._graphs is not None:
            self._graphs = None
            empty_cublas_workspaces()  # recording takes one of its own
        self.kv = KvSlots(0, self.device)

    def logits(self, parts: Sequence[Part]) -> torch.Tensor:
        """See `engine.step`."""
        sizes = sizes_of(parts)
        if self.has_equal_bits:
            sizes = replace(sizes, rows=max(sizes.rows, self._least_rows))
        if self._graphs is not None:
            recorded = self._graphs.run(parts, sizes, self._embedded)
            if recorded is not None:
                return recorded
        rows = table_of_rows(self.kv, parts, device=self.device, sizes=sizes)
        return self._forward(rows, input_ids=rows.tokens[None])

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.network.get_input_embeddings()(tokens[None])
        return embedded

    def _forward(self, rows: Rows, **inputs: torch.Tensor) -> torch.Tensor:
        with self._for_rows(rows):
            out = self.network(
                position_ids=rows.positions[None],
                use_cache=False,
                logits_to_keep=rows.asked,
                **inputs,
            )
        logits: torch.Tensor = out.logits[0]
        return logits

    @contextlib.contextmanager
    def _for_rows(self, rows: Rows) -> Iterator[None]:
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
