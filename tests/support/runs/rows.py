"""One text through a network in many ways: at once, in pieces, in trees, in scattered slots."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from layerpack.runtime.core.patience import Patience
from layerpack.runtime.engine.sequence import RowSequence
from layerpack.runtime.engine.tree import ROOT, Tree
from layerpack.runtime.network.row_network import RowNetwork


def one_by_one(rows: RowNetwork, ids: Sequence[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary) of passes of one token each."""
    with opened(rows, len(ids)) as sequence:
        return torch.cat([sequence.extend(ids[: end + 1]) for end in range(len(ids))])


def unequal_seeds(rows: RowNetwork, ids: Sequence[int], seeds: Sequence[int]) -> list[int]:
    """Of these seeds those by which a cut and a tree give other logits than passes of one token."""
    alone, unequal = one_by_one(rows, ids), []
    for seed in seeds:
        chance = random.Random(seed)
        begin = chance.randrange(2, len(ids) - 1)
        if not torch.equal(in_a_tree(rows, ids, begin, chance), alone[begin - 1 :]):
            unequal.append(seed)
    return unequal


def in_a_tree(
    rows: RowNetwork, ids: Sequence[int], begin: int, chance: random.Random
) -> torch.Tensor:
    """Logits of the tokens from `begin` - 1 on: they are nodes in random places among others."""
    with opened(rows, len(ids), 4 * len(ids)) as sequence:
        pieces = sorted(chance.sample(range(1, begin), min(3, begin - 1)))
        for end in pieces:  # a prompt cut anywhere, with trees that are all wrong between
            sequence.extend(ids[:end], _rubbish(chance, chance.randrange(5)))
        tree, places, place = _rubbish(chance, chance.randrange(6)), [], ROOT
        for token in ids[begin:]:
            place = tree.add(place, token)
            places.append(place)
            for _ in range(chance.randrange(3)):
                tree.add(chance.choice([ROOT, *range(len(tree))]), chance.randrange(90))
        logits = sequence.extend(ids[:begin], tree)
    return logits[[0, *(place + 1 for place in places)]]


def opened(rows: RowNetwork, tokens: int, nodes: int = 0) -> AbstractContextManager[RowSequence]:
    """A sequence with so much room."""
    return RowSequence.opened(rows, max_tokens=tokens, max_nodes=nodes, patience=Patience())


def _rubbish(chance: random.Random, count: int) -> Tree:
    tree = Tree()
    while len(tree) < count:
        tree.add(chance.choice([ROOT, *range(len(tree))]), chance.randrange(90))
    return tree
