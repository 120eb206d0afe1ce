"""Passes of few rows over a network that lies in VRAM, recorded once: one launch for all layers.

The host takes longer to order the kernels of a small model's layer than the card to run them. A
recorded pass (a CUDA graph) is of one size, in memory of its own: tables are filled up to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerpack.libraries.transformers_rope import Rope
from layerpack.runtime.kv.slots import KvSlots
from layerpack.runtime.network.rows import Part, Rows, Sizes, Table, rows_of

_NUM_ROWS = (1, 4, 16, 64)
_TAIL = 32

Forward = Callable[..., torch.Tensor]
"""`forward(rows, inputs_embeds=…)`: the logits of the rows asked for."""


def can_be_recorded(network: Any) -> bool:
    """Whether all that a pass computes from its embedded tokens on is the same each time."""
    takes_embedded = "inputs_embeds" in inspect.signature(type(network).forward).parameters
    return takes_embedded and not Rope(network).follows_length


@dataclass(slots=True, kw_only=True)
class _Recorded:
    sizes: Sizes
    numbers: torch.Tensor
    rows: Rows
    embedded: torch.Tensor
    graph: torch.cuda.CUDAGraph | None = None
    logits: torch.Tensor | None = None


class Graphs:
    """Recorded passes over `kv`, of which there is one for each number of rows.

    A size's first pass is run, as it may compile kernels and takes the slots' memory; the second
    one is recorded. What cannot be recorded is run from then on.
    """

    def __init__(self, kv: KvSlots, device: torch.device, forward: Forward) -> None:
        self._kv, self._device, self._forward = kv, device, forward
        self._recorded: dict[int, _Recorded] = {}
        self._pool: Any = None
        self._works = True

    def run(
        self,
        parts: Sequence[Part],
        wanted: Sizes,
        embed: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor | None:
        """Logits (asked, vocabulary), in memory that the next pass writes to; None: too large."""
        count = next((count for count in _NUM_ROWS if count >= wanted.rows), None)
        if count is None or not self._works:
            return None
        path = self._kv.num_slots + 1
        sizes = Sizes(rows=count, tail=_TAIL, path=path, asked=count)
        if not sizes.holds(wanted):
            return None
        table = Table(parts, sizes, kv=self._kv, runs=False)
        one = self._recorded.get(count)
        if one is None:
            return self._first(table, embed)[: table.num_asked]
        one.numbers.copy_(table.numbers)
        one.embedded.copy_(embed(one.rows.tokens))
        if one.graph is None and not self._record(one):
            return None
        assert one.graph is not None and one.logits is not None
        one.graph.replay()
        return one.logits[: table.num_asked]

    def _first(self, table: Table, embed: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        numbers = table.numbers.to(self._device)
        rows = rows_of(numbers, table.sizes, (), self._kv)
        embedded = embed(rows.tokens)
        self._recorded[table.sizes.rows] = _Recorded(
            sizes=table.sizes, numbers=numbers, rows=rows, embedded=embedded
        )
        return self._forward(rows, inputs_embeds=embedded)

    def _record(self, one: _Recorded) -> bool:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads go on copying to the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                one.logits = self._forward(one.rows, inputs_embeds=one.embedded)
        except RuntimeError:
            self._works = False
            return False
        self._pool, one.graph = graph.pool(), graph
        return True
