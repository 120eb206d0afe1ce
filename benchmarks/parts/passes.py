"""Passes of an open model timed, the link alone timed, and what must not grow: for stream.py."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from layerpack.formats.read import BufferedReader
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.engine.sequence import RowSequence
from layerpack.runtime.engine.tree import ROOT, Tree
from layerpack.runtime.model import Model
from layerpack.runtime.requests import running
from layerpack.runtime.stream.host_tier import HostTier

DEVICE = torch.device("cuda", 0)
GROWTH_FIRST, GROWTH_PASSES = 10, 100


def measure_link_limit(slices: Sequence[Slice]) -> tuple[float, float]:
    """(GB/s of copies alone over the whole pass, seconds to map and register it)."""
    with HostTier(DEVICE) as store:
        begin_s = time.perf_counter()
        store.load(slices, BufferedReader(), patience=Patience())
        load_s = time.perf_counter() - begin_s
        target = torch.empty(
            max(part.slot_bytes for part in slices), dtype=torch.uint8, device=DEVICE
        )
        times_s = []
        for _ in range(6):
            torch.cuda.synchronize()
            begin_s = time.perf_counter()
            for tensor in store.tensors.values():
                target[: tensor.numel()].copy_(tensor, non_blocking=True)
            torch.cuda.synchronize()
            times_s.append(time.perf_counter() - begin_s)
        total = sum(part.length_bytes for part in slices)
        return total / 1e9 / statistics.median(times_s[1:]), load_s


def time_passes(
    model: Model, *, context: int, tokens: int, passes: int, warm_up: int, nodes: int = 0
) -> list[float]:
    """Seconds of each pass with `tokens` new tokens over a cache of `context`.

    A prefill of `context` goes before them, and `warm_up` passes. All but the first of `tokens`,
    and further `nodes` of a tree, are tried and taken back, so all passes are alike.
    """
    times_s: list[float] = []
    tried = tokens - 1 + nodes
    with sequence_of(model, context + tokens, tried) as sequence:
        known = _ids(context)
        if context:
            sequence.extend(known)
        while context and len(times_s) < warm_up + passes:
            known += _ids(1)
            times_s.append(_time(sequence, known, _tree(tokens - 1, nodes)))
    while not context and len(times_s) < warm_up + passes:
        with sequence_of(model, tokens, 0) as sequence:
            times_s.append(_time(sequence, _ids(tokens), Tree()))
    return times_s[warm_up:]


def _tree(chain: int, nodes: int) -> Tree:
    """A chain, and further nodes in places of chance."""
    tree = Tree()
    for _ in range(chain):
        tree.add(len(tree) - 1, random.randrange(256))
    while len(tree) < chain + nodes:
        tree.add(random.randrange(-1, len(tree)), random.randrange(256))
    return tree


def sequence_of(
    model: Model, tokens: int, nodes: int, *, spare: int = 100
) -> AbstractContextManager[RowSequence]:
    """A sequence of the model, with room for so much."""
    rows = model.rows
    assert rows is not None, model.why_no_rows
    most = tokens + spare
    return RowSequence.opened(rows, max_tokens=most, max_nodes=nodes, patience=Patience())


@contextmanager
def let_pass(count: int) -> Iterator[None]:
    """In the block `generate` takes so many nodes of each tree for right, the likeliest ones."""

    def forced(tree: Tree, choose: Callable[[int, int], int]) -> tuple[list[int], list[int]]:
        tokens, right, place = list[int](), list[int](), ROOT
        while len(right) < count and place in tree.parents:
            place = tree.parents.index(place)
            right.append(place)
            tokens.append(tree.tokens[place])
        own = choose(place, len(tokens))
        return [*tokens, own], right

    with mock.patch.object(running, "follow", forced):
        yield


def _time(sequence: RowSequence, ids: list[int], tree: Tree) -> float:
    torch.cuda.synchronize()
    begin_s = time.perf_counter()
    int(sequence.extend(ids, tree)[-1].argmax())  # a user waits for the token
    torch.cuda.synchronize()
    return time.perf_counter() - begin_s


def _ids(count: int) -> list[int]:
    return [random.randrange(256) for _ in range(count)]


def measure_growth(model: Model, *, context: int) -> dict[str, int]:
    """How much the marks differ between the tenth pass and a hundred passes later."""
    marks = []
    with sequence_of(model, context + GROWTH_FIRST + GROWTH_PASSES, 0) as sequence:
        known = _ids(context)
        sequence.extend(known)
        for number in range(1, GROWTH_FIRST + GROWTH_PASSES + 1):
            known += _ids(1)
            sequence.extend(known)
            if number in (GROWTH_FIRST, GROWTH_FIRST + GROWTH_PASSES):
                torch.cuda.synchronize()
                marks.append(memory_marks())
    return {name: marks[1][name] - marks[0][name] for name in marks[0]}


def memory_marks() -> dict[str, int]:
    """What must not grow: resident host memory that is not file pages, VRAM, open files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "host_bytes": int(status["RssAnon"].split()[0]) * 1024,
        "vram_bytes": torch.cuda.memory_allocated(DEVICE),
        "files": len(os.listdir("/proc/self/fd")),
    }


def summary(times_s: list[float]) -> dict[str, Any]:
    """Median and spread."""
    return {
        "median_s": round(statistics.median(times_s), 4),
        "min_s": round(min(times_s), 4),
        "max_s": round(max(times_s), 4),
        "passes": len(times_s),
    }
