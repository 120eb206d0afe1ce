"""One sequence of one network: the tokens in its KV cache, and the passes that extend it."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from layerpack.libraries.transformers_rope import Rope
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.engine.step import plain_step, step
from layerpack.runtime.engine.tree import ROOT, Tree
from layerpack.runtime.network.row_network import RowNetwork
from layerpack.runtime.network.rows import Part
from layerpack.runtime.plan.needs import PREFILL_TOKENS
from layerpack.runtime.trace.steps import Steps

_NOTHING = Tree()


class AnySequence(Protocol):
    """What a generation extends."""

    def room(self, num_tokens: int) -> int | None:
        """How many tokens may be tried behind `num_tokens` in one pass; None: any number."""

    def extend(self, ids: Sequence[int], tree: Tree = _NOTHING) -> torch.Tensor:
        """Run the tokens of the whole sequence `ids` that the cache lacks, and the tree's nodes.

        Returns the logits (1 + nodes, vocabulary) of the last token and of each node. Raises
        StreamError, CancelledError.
        """

    def keep(self, places: Sequence[int]) -> None:
        """Of the nodes tried last these, one after the other, belong to the sequence."""


class RowSequence:
    """A sequence as rows over slots: nodes that were wrong give theirs back, nothing is copied.

    Make one with `opened`; one at a time for a network, as some rotary embeddings follow the length
    of the sequence at hand.
    """

    def __init__(
        self,
        network: RowNetwork,
        *,
        max_tokens: int,
        max_nodes: int,
        patience: Patience,
        steps: Steps | None,
    ) -> None:
        self._network, self._patience, self._steps = network, patience, steps
        self._rope = Rope(network.network)
        self._kv = network.reserve(max_tokens + max_nodes)
        self._path = array("q")  # the slots of the sequence, in order
        self._tails: list[list[int]] = []  # of each node tried: the slots on the way to it

    @classmethod
    @contextmanager
    def opened(
        cls,
        network: RowNetwork,
        *,
        max_tokens: int,
        max_nodes: int = 0,
        patience: Patience,
        steps: Steps | None = None,
    ) -> Iterator[RowSequence]:
        """With room for `max_tokens` tokens and as many tried nodes; it goes with the block."""
        sequence = cls(
            network, max_tokens=max_tokens, max_nodes=max_nodes, patience=patience, steps=steps
        )
        with sequence._rope.sequence():
            try:
                yield sequence
            finally:
                sequence._forget()

    def room(self, num_tokens: int) -> int | None:
        """See `AnySequence`."""
        return self._rope.room(num_tokens)

    def extend(self, ids: Sequence[int], tree: Tree = _NOTHING) -> torch.Tensor:
        """See `AnySequence`."""
        self.keep(())
        known = len(self._path)
        room = self._rope.room(known)
        is_prompt = not known or (room is not None and len(ids) - known > room)
        with contextlib.ExitStack() as around:
            if is_prompt:
                self._forget()
                around.enter_context(self._rope.prompt(len(ids)))
            while len(ids) - len(self._path) > PREFILL_TOKENS:
                self._pass(ids[len(self._path) :][:PREFILL_TOKENS], _NOTHING)
                if self._steps is not None:
                    self._steps.known(0)
            return self._pass(ids[len(self._path) :], tree)

    def branch(self, tokens: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
        """Try further nodes behind `parents`: places of nodes tried since `extend`, or ROOT.

        Returns their logits (nodes, vocabulary).
        """
        more = Tree()
        more.tokens, more.parents = list(tokens), list(parents)
        return self._pass((), more)

    def keep(self, places: Sequence[int]) -> None:
        """See `AnySequence`."""
        kept = [self._tails[place][-1] for place in places]
        left = {tail[-1] for tail in self._tails} - set(kept)
        self._kv.give(sorted(left, reverse=True))
        self._path.extend(kept)
        self._tails = []

    def _forget(self) -> None:
        self.keep(())
        self._kv.give(self._path[::-1])
        self._path = array("q")

    def _pass(self, tokens: Sequence[int], tree: Tree) -> torch.Tensor:
        self._patience.check()
        begin_s = time.perf_counter()
        slots = self._kv.take(len(tokens) + len(tree))
        self._path.extend(slots[: len(tokens)])
        first = len(self._tails)
        for slot, parent in zip(slots[len(tokens) :], tree.parents, strict=True):
            above = [] if parent == ROOT else self._tails[parent]
            self._tails.append([*above, slot])
        part = Part(path=self._path, tokens=tokens, nodes=tree.tokens, tails=self._tails[first:])
        logits = step(self._network, [part])
        if self._steps is not None:
            self._steps.ran(len(tokens) + len(tree), begin_s)
        return logits


class PlainSequence:
    """The sequence of a network that takes no rows, over transformers' own KV cache."""

    def __init__(
        self, network: Any, *, max_tokens: int, patience: Patience, steps: Steps | None
    ) -> None:
        self._network, self._max_tokens = network, max_tokens
        self._patience, self._steps = patience, steps
        self._rope = Rope(network)
        self._known = 0
        self._cache: Any = None

    @classmethod
    @contextmanager
    def opened(
        cls, network: Any, *, max_tokens: int, patience: Patience, steps: Steps | None = None
    ) -> Iterator[PlainSequence]:
        """With room for `max_tokens` tokens; the cache goes with the block."""
        sequence = cls(network, max_tokens=max_tokens, patience=patience, steps=steps)
        with sequence._rope.sequence():
            try:
                yield sequence
            finally:
                sequence._cache = None

    def room(self, num_tokens: int) -> int | None:
        """See `AnySequence`; nothing is ever tried."""
        return 0

    def extend(self, ids: Sequence[int], tree: Tree = _NOTHING) -> torch.Tensor:
        """See `AnySequence`; the tree is empty."""
        room = self._rope.room(self._known)
        is_prompt = not self._known or (room is not None and len(ids) - self._known > room)
        with contextlib.ExitStack() as around:
            if is_prompt:
                from layerpack.runtime.kv.reserved import reserved_cache  # late: transformers

                most = max(self._max_tokens, len(ids))
                self._cache, self._known = reserved_cache(self._network.config, most), 0
                around.enter_context(self._rope.prompt(len(ids)))
            while True:
                self._patience.check()
                begin_s = time.perf_counter()
                piece = ids[self._known : self._known + PREFILL_TOKENS]
                tokens = torch.tensor([list(piece)], device=self._network.device)
                logits = plain_step(self._network, tokens, self._cache)
                self._known += len(piece)
                if self._steps is not None:
                    self._steps.ran(len(piece), begin_s)
                if self._known == len(ids):
                    return logits
                if self._steps is not None:
                    self._steps.known(0)

    def keep(self, places: Sequence[int]) -> None:
        """Nothing was tried."""
