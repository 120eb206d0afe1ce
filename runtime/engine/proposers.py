"""Who proposes tokens for a pass to check: a draft that grows trees, the text's own repetitions."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from layerpack.runtime.engine.lookup import Lookup
from layerpack.runtime.engine.sampling import Sampler
from layerpack.runtime.engine.sequence import RowSequence
from layerpack.runtime.engine.tree import ROOT, Tree


class Proposer(Protocol):
    """`propose`, then `accepted`, for each pass."""

    def propose(self, ids: Sequence[int], most: int) -> Tree:
        """Nodes that may follow `ids`, no deeper than `most`. Raises CancelledError."""

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
    return TreeShape(nodes=nodes, levels=min(nodes, 16 if nodes > 128 else 12), beams=beams)


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

    def __init__(self, sequence: RowSequence, sampler: Sampler, shape: TreeShape) -> None:
        self._sequence, self._sampler, self._shape = sequence, sampler, shape
        self._tried: dict[int, int] = {}  # a proposed node's place to that in the draft's sequence

    def propose(self, ids: Sequence[int], most: int) -> Tree:
        """See `Proposer`; waits."""
        room = self._sequence.room(len(ids))
        levels = min(self._shape.levels, most, most if room is None else room)
        nodes: list[_Node] = []
        level: list[int] = [ROOT]
        logits, num_tried = self._sequence.extend(ids), 0
        for depth in range(max(0, levels)):
            scores = self._sampler.scores(logits, [len(ids) + depth] * len(level))
            best = scores.log_softmax(-1).topk(min(self._shape.beams, logits.shape[-1]))
            begin = len(nodes)
            for parent, row, tokens in zip(
                level, best.values.tolist(), best.indices.tolist(), strict=True
            ):
                above = nodes[parent].score if parent != ROOT else 0.0
                nodes += [_Node(above + s, t, parent) for s, t in zip(row, tokens, strict=True)]
            level = heapq.nlargest(
                self._shape.beams, range(begin, len(nodes)), key=lambda place: nodes[place].score
            )
            if depth + 1 < levels:
                parents = [nodes[place].parent for place in level]
                logits = self._sequence.branch(
                    [nodes[place].token for place in level],
                    [ROOT if parent == ROOT else nodes[parent].tried for parent in parents],
                )
                for place in level:
                    nodes[place].tried, num_tried = num_tried, num_tried + 1
        return self._likeliest(nodes)

    def accepted(self, places: Sequence[int]) -> None:
        """See `Proposer`."""
        kept = []
        for place in places:
            if place not in self._tried:
                break
            kept.append(self._tried[place])
        self._sequence.keep(kept)

    def _likeliest(self, nodes: list[_Node]) -> Tree:
        """A parent is no less likely than its children and stands before them: it is there, too."""
        tree, places = Tree(), {ROOT: ROOT}
        self._tried = {}
        order = sorted(range(len(nodes)), key=lambda place: -nodes[place].score)
        for number in order[: self._shape.nodes]:
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

    def propose(self, ids: Sequence[int], most: int) -> Tree:
        """See `Proposer`."""
        tree = Tree() if self._other is None else self._other.propose(ids, most)
        chain = self._lookup.propose(ids, min(most, self._count))
        tree.add_chain(chain, len(tree) + self._count)
        return tree

    def accepted(self, places: Sequence[int]) -> None:
        """See `Proposer`."""
        if self._other is not None:
            self._other.accepted(places)
