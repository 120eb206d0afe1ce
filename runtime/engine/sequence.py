"""One sequence of one network: the tokens in its KV cache, and the passes that extend it."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

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


class RowSequence:
    """A sequence as rows over slots: nodes that were wrong give theirs back, nothing is copied.

    One of a `Pool`, or alone with its network: `opened`. Some rotary embeddings follow the length
    of the sequence at hand; a network that has one takes one sequence at a time.
    """

    def __init__(
        self,
        network: RowNetwork,
        *,
        shared: Sequence[int] = (),
        patience: Patience,
        steps: Steps | None = None,
    ) -> None:
        """`shared` are slots of its first tokens, which it holds, as others do."""
        self._network, self._patience, self._steps = network, patience, steps
        self._rope = Rope(network.network)
        self._kv = network.kv
        self.path = array("q", shared)
        """The slots of its tokens, in order."""
        self._tails: list[list[int]] = []  # of each node tried: the slots on the way to it
        self._prompt_tokens = 0  # of which the rotary embeddings are to know
        self._in_prompt = False
        self.is_written = True
        """Whether the pass of its last part took place: its keys and values are there."""

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
        network.reserve(max_tokens + max_nodes)
        sequence = cls(network, patience=patience, steps=steps)
        with sequence.alone():
            try:
                yield sequence
            finally:
                sequence.forget()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """In the block the network's rotary embeddings may follow the sequence's length."""
        with self._rope.sequence():
            yield

    @property
    def num_known(self) -> int:
        """Tokens whose keys and values are there."""
        return len(self.path)

    def room(self, num_tokens: int) -> int | None:
        """How many tokens may be tried behind `num_tokens` in one pass; None: any number."""
        return self._rope.room(num_tokens)

    def extend(self, ids: Sequence[int], tree: Tree = _NOTHING) -> torch.Tensor:
        """Run the tokens of the whole sequence `ids` that the cache lacks, and the tree's nodes.

        Returns the logits (1 + nodes, vocabulary) of the last token and of each node. Raises
        StreamError, CancelledError.
        """
        while True:
            part, is_last = self.part(ids, tree, PREFILL_TOKENS)
            logits = self._pass(part)
            if is_last:
                return logits
            if self._steps is not None:
                self._steps.known(0)

    def part(self, ids: Sequence[int], tree: Tree, most: int) -> tuple[Part, bool]:
        """What a pass is to do next of `extend`, with at most `most` tokens; whether that is all.

        The tree goes with the last of it.
        """
        self.keep(())
        self.is_written = False
        known = len(self.path)
        room = self._rope.room(known)
        # Of a prompt that is under way the rotary embeddings know the length already.
        too_long = known >= self._prompt_tokens and room is not None and len(ids) - known > room
        if not known or too_long:
            self.forget()
            self._prompt_tokens = len(ids)
        tokens = ids[len(self.path) :][:most]
        self._in_prompt = len(self.path) < self._prompt_tokens
        is_last = len(self.path) + len(tokens) == len(ids)
        nodes = tree if is_last else _NOTHING
        return self._part(tokens, nodes.tokens, nodes.parents), is_last

    def written(self) -> None:
        """The pass of the part that was made last has taken place."""
        self.is_written = True

    def turned(self) -> AbstractContextManager[None]:
        """Around the pass of the part that was made last."""
        if self._in_prompt:
            return self._rope.prompt(self._prompt_tokens)
        return contextlib.nullcontext()

    def branch(self, tokens: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
        """Try further nodes behind `parents`: places of nodes tried since `extend`, or ROOT.

        Returns their logits (nodes, vocabulary).
        """
        self._in_prompt = False
        return self._pass(self._part((), tokens, parents))

    def keep(self, places: Sequence[int]) -> None:
        """Of the nodes tried last these, one after the other, belong to the sequence."""
        kept = [self._tails[place][-1] for place in places]
        left = {tail[-1] for tail in self._tails} - set(kept)
        self._kv.give(sorted(left, reverse=True))
        self.path.extend(kept)
        self._tails = []

    def forget(self) -> None:
        """Give all slots back."""
        self.keep(())
        self._kv.give(self.path[::-1])
        self.path = array("q")

    def leave(self) -> list[int]:
        """Its slots, which are somebody else's to give back from here on."""
        slots, self.path = list(self.path), array("q")
        return slots

    def _part(self, tokens: Sequence[int], nodes: Sequence[int], parents: Sequence[int]) -> Part:
        slots = self._kv.take(len(tokens) + len(nodes))
        self.path.extend(slots[: len(tokens)])
        first = len(self._tails)
        for slot, parent in zip(slots[len(tokens) :], parents, strict=True):
            above = [] if parent == ROOT else self._tails[parent]
            self._tails.append([*above, slot])
        return Part(path=self.path, tokens=tokens, nodes=nodes, tails=self._tails[first:])

    def _pass(self, part: Part) -> torch.Tensor:
        self._patience.check()
        begin_s = time.perf_counter()
        with self.turned():
            logits = step(self._network, [part])
        if self._steps is not None:
            self._steps.ran(part.num_rows, begin_s)
        return logits


class PlainSequence:
    """The sequence of a network that takes no rows, over transformers' own KV cache."""

    def __init__(
        self, network: Any, *, max_tokens: int, patience: Patience, steps: Steps | None
    ) -> None:
        """Make one with `opened`."""
        self._network, self._max_tokens = network, max_tokens
        self._patience, self._steps = patience, steps
        self._rope = Rope(network)
        self._known = self._prompt_tokens = 0
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
        """Nothing is ever tried."""
        return 0

    @property
    def num_known(self) -> int:
        """Tokens whose keys and values are there."""
        return self._known

    def extend(self, ids: Sequence[int], tree: Tree = _NOTHING) -> torch.Tensor:
        """See `RowSequence.extend`; the tree is empty."""
        while True:
            begin_s, known = time.perf_counter(), self._known
            logits, is_last = self.advance(ids)
            if self._steps is not None:
                self._steps.ran(self._known - known, begin_s)
            if is_last:
                return logits
            if self._steps is not None:
                self._steps.known(0)

    def advance(self, ids: Sequence[int]) -> tuple[torch.Tensor, bool]:
        """One pass of `extend`: logits of the last token that went in, and whether that is all."""
        self._patience.check()
        known, room = self._known, self._rope.room(self._known)
        too_long = known >= self._prompt_tokens and room is not None and len(ids) - known > room
        if not known or too_long:
            from layerpack.runtime.kv.reserved import reserved_cache  # late: transformers

            most = max(self._max_tokens, len(ids))
            self._cache, self._known = reserved_cache(self._network.config, most), 0
            self._prompt_tokens = len(ids)
        is_prompt = self._known < self._prompt_tokens
        around = self._rope.prompt(self._prompt_tokens) if is_prompt else contextlib.nullcontext()
        with around:
            piece = ids[self._known : self._known + PREFILL_TOKENS]
            tokens = torch.tensor([list(piece)], device=self._network.device)
            logits = plain_step(self._network, tokens, self._cache)
        self._known += len(piece)
        return logits, self._known == len(ids)

    def keep(self, places: Sequence[int]) -> None:
        """Nothing was tried."""
