"""Pieces made by several threads: in order again at the end, few at a time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from layerpack.convert.pipeline import pipeline
from layerpack.convert.pipeline.pipeline import _make
from layerpack.convert.pipeline.weights import Cut

pytestmark = pytest.mark.timeout(20)
MOST, MAX_BYTES, WORKERS = 5, 100, 4


class _Shelf:
    """Files come late: half of the times that it is asked."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def has(self, _: object) -> bool:
        return self._chance.random() < 0.5

    def need(self, _: object) -> None:
        time.sleep(0.0001)


class _Blob:
    source_files = ()

    def __init__(self, sizes: list[int]) -> None:
        self.items = sizes


class _Maker:
    """A cut is its size; making it takes a while."""

    def __init__(self, chance: random.Random) -> None:
        self._chance, self._lock = chance, threading.Lock()
        self.running: list[int] = []
        self.seen: list[tuple[int, int]] = []
        self.begun = 0

    def cuts(self, size: int) -> Iterator[Cut]:
        item: Any = size
        yield Cut(item=item, source_bytes=0, memory_bytes=size, is_last=True)

    def make(self, cut: Cut) -> int:
        with self._lock:
            self.begun += 1
            self.running.append(cut.memory_bytes)
            self.seen.append((len(self.running), sum(self.running)))
        time.sleep(self._chance.random() * 0.004)
        with self._lock:
            self.running.remove(cut.memory_bytes)
        return cut.memory_bytes


def made(maker: Any, blobs: list[list[int]], *, most: int = MOST) -> Iterator[Any]:
    shelf: Any = _Shelf(random.Random(7))
    with ThreadPoolExecutor(WORKERS) as pool:
        plans: Any = [_Blob(sizes) for sizes in blobs]
        yield from _make(plans, shelf, maker, pool, most=most)


def test_order_and_bounds_hold_whatever_the_threads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_MAX_BYTES", MAX_BYTES)
    chance = random.Random(5)
    blobs = [[chance.choice([1, 30, 60, 1000]) for _ in range(20)] for _ in range(8)]
    maker = _Maker(chance)
    assert [piece for _, piece in made(maker, blobs)] == [size for sizes in blobs for size in sizes]
    assert max(count for count, _ in maker.seen) in range(2, WORKERS + 1)
    # What is larger than the bound is let on alone.
    assert all(size_bytes <= MAX_BYTES or count == 1 for count, size_bytes in maker.seen)
    assert list(made(maker, [])) == []


def test_the_takers_piece_counts_until_it_asks_for_the_next() -> None:
    maker = _Maker(random.Random(3))
    for number, _ in enumerate(made(maker, [[1, 1, 1]], most=1)):
        time.sleep(0.02)
        assert maker.begun == number + 1
