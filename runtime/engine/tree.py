"""Proposed tokens as a tree: continuations that share their beginnings, checked in one pass.

Source: Miao et al., SpecInfer, https://arxiv.org/abs/2305.09781.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

ROOT = -1
"""The parent of nodes that follow the text directly."""


class Tree:
    """Nodes in an order in which parents come first; `parents[i]` is a place before i, or ROOT."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._places: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, parent: int, token: int) -> int | None:
        """The place of the node with this token behind `parent`, if there is one."""
        return self._places.get((parent, token))

    def add(self, parent: int, token: int) -> int:
        """The place of that node, which is there then."""
        place = self.child(parent, token)
        if place is None:
            place = self._places[parent, token] = len(self)
            self.tokens.append(token)
            self.parents.append(parent)
        return place

    def add_chain(self, tokens: Sequence[int], most: int) -> None:
        """One token after the other, from the root, while the tree has fewer than `most` nodes."""
        place = ROOT
        for token in tokens:
            if self.child(place, token) is None and len(self) >= most:
                return
            place = self.add(place, token)


def follow(tree: Tree, choose: Callable[[int, int], int]) -> tuple[list[int], list[int]]:
    """The tokens that a checked tree gives, and the places of the nodes that were right.

    `choose(place, ahead)` is the model's own token behind the node at `place`, `ahead` tokens after
    the first. There is one token more than nodes.
    """
    place, tokens, right = ROOT, list[int](), list[int]()
    while True:
        tokens.append(choose(place, len(tokens)))
        found = tree.child(place, tokens[-1])
        if found is None:
            return tokens, right
        right.append(found)
        place = found
