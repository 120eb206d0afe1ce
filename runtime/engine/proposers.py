"""Who proposes tokens for a pass to check: a draft that grows trees, the text's own repetitions."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from layerpack.runtime.engine.lookup import Lookup
from layerpack.runtime.engine.pace import Pace
from layerpack.runtime.engine.sampling import Sampler
from layerpack.runtime.engine.sequence import RowSequence
from layerpack.runtime.engine.tree import ROOT, Tree

_MOST_LEVELS = 32  # a sure draft writes long chains; others end where no node is likely enough


class Proposer(Protocol):
    """`propose`, then `accepted`, for each pass."""

    def propose(self, ids: Sequence[int], most: int, most_nodes: int) -> Tree:
        """At most so many nodes that may follow `ids`, no deeper than `most`.

        Raises CancelledError.
        """

    def accepted(self, places: Sequence[int]) -> None:
        """These nodes of what was proposed last were right, one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeShape:
    """At most so many nodes, grown in so many levels, of which each expands so many."""

    nodes: int
    levels: int
    beams: int


def shape_of(nodes: int) -> TreeShape:
    """What gave most tokens a pass for a real pair of models (Qwen2.5-Coder 1.5B and 0.5B)."""
    beams = 1 if nodes <= 4 else 4 if nodes <= 16 else 8 if nodes <= 128 else 16
    return TreeShape(nodes=nodes, levels=min(nodes, _MOST_LEVELS), beams=beams)


@dataclass(slots=True)
class _Node:
    """`score` is its log-probability behind the text; `tried` its place in the draft's sequence."""

    score: float
    token: int
    parent: int
    tried: int = ROOT


class DraftProposer:
    """A draft that follows the large model's sequence with one of its own, and grows trees.

    Level by level the likeliest nodes get children, by one pass of the draft each; of all nodes the
    likeliest are proposed. It scores with the large model's sampler, noise included, so what it
    finds likely is what would be drawn wherever its logits are like the large model's.
    Sources: SpecExec, https://arxiv.org/abs/2406.02532; EAGLE-2, https://arxiv.org/abs/2406.16858.
    """

    def __init__(
        self,
        sequence: RowSequence,
        sampler: Sampler,
        shape: TreeShape,
        pace: Pace | None = None,
    ) -> None:
        """`pace` None: always all levels of the shape; else those that are worth their time."""
        self._sequence, self._sampler, self._shape = sequence, sampler, shape
        self._pace = pace
        self._tried: dict[int, int] = {}  # a proposed node's place to that in the draft's sequence

    def propose(self, ids: Sequence[int], most: int, most_nodes: int) -> Tree:
        """See `Proposer`; waits."""
        num_nodes = min(self._shape.nodes, most_nodes)
        room = self._sequence.room(len(ids))
        levels = min(self._shape.levels, most, most if room is None else room)
        nodes: list[_Node] = []
        level: list[int] = [ROOT]
        logits, num_tried, likely = self._sequence.extend(ids), 0, 1.0
        if self._pace is not None:
            self._pace.begin()
        for depth in range(max(0, levels)):
            begin = len(nodes)
            for parent, children in zip(
                level, self._children(logits, len(ids) + depth), strict=True
            ):
                above = nodes[parent].score if parent != ROOT else 0.0
                nodes += [_Node(above + score, token, parent) for score, token in children]
            level = heapq.nlargest(
                self._shape.beams, range(begin, len(nodes)), key=lambda place: nodes[place].score
            )
            before, likely = likely, sum(math.exp(nodes[place].score) for place in level)
            if self._pace is not None:
                self._pace.level(likely)
                if not self._pace.is_worth(likely * likely / before if before else 0.0):
                    break
            best = nodes[level[0]].score
            if sum(node.score > best for node in nodes) >= num_nodes:
                break  # nothing behind this level is among the likeliest
            if depth + 1 < levels:
                parents = [nodes[place].parent for place in level]
                logits = self._sequence.branch(
                    [nodes[place].token for place in level],
                    [ROOT if parent == ROOT else nodes[parent].tried for parent in parents],
                )
                for place in level:
                    nodes[place].tried, num_tried = num_tried, num_tried + 1
        if self._pace is not None:
            self._pace.end()
        return self._likeliest(nodes, num_nodes)

    def accepted(self, places: Sequence[int]) -> None:
        """See `Proposer`."""
        if self._pace is not None:
            self._pace.checked(len(places))
        kept = []
        for place in places:
            if place not in self._tried:
                break
            kept.append(self._tried[place])
        self._sequence.keep(kept)

    def _children(
        self, logits: torch.Tensor, position: int
    ) -> Iterator[Iterator[tuple[float, int]]]:
        """Of each row the likeliest tokens, with their log-probabilities; one wait for them all."""
        scores = self._sampler.scores(logits, [position] * len(logits))
        best = scores.log_softmax(-1).topk(min(self._shape.beams, logits.shape[-1]))
        # Token ids are whole in float64.
        found = torch.stack([best.values.double(), best.indices.double()], -1).tolist()
        return (((score, int(token)) for score, token in row) for row in found)

    def _likeliest(self, nodes: list[_Node], count: int) -> Tree:
        """A parent is no less likely than its children and stands before them: it is there, too."""
        tree, places = Tree(), {ROOT: ROOT}
        self._tried = {}
        order = sorted(range(len(nodes)), key=lambda place: -nodes[place].score)
        for number in order[:count]:
            node = nodes[number]
            places[number] = place = tree.add(places[node.parent], node.token)
            if node.tried != ROOT:
                self._tried[place] = node.tried
        return tree


class LookupProposer:
    """What followed the last time that the text ended as it does now, behind what another says."""

    def __init__(self, count: int, other: Proposer | None) -> None:
        """`count` tokens at a time, as a further branch of the tree of `other`."""
        self._lookup, self._count, self._other = Lookup(), count, other

    def propose(self, ids: Sequence[int], most: int, most_nodes: int) -> Tree:
        """See `Proposer`."""
        count = min(self._count, most_nodes)
        tree = Tree()
        if self._other is not None:
            tree = self._other.propose(ids, most, most_nodes - count)
        chain = self._lookup.propose(ids, min(most, count))
        tree.add_chain(chain, len(tree) + count)
        return tree

    def accepted(self, places: Sequence[int]) -> None:
        """See `Proposer`."""
        if self._other is not None:
            self._other.accepted(places)
