"""Trees grow as long as a level gives more tokens a second than there are without it."""

from __future__ import annotations

import pytest

from layerpack.runtime.engine import pace as module
from layerpack.runtime.engine.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def levels_of(pace: Pace, clock: Clock, *, level_s: float, pass_s: float, likely: float) -> int:
    """How many levels grow, of at most 40, each right with `likely` of the chance of the last."""
    chance, levels = 1.0, 0
    pace.begin()
    while levels < 40:
        clock.now_s += level_s
        levels += 1
        chance *= likely
        pace.level(chance)
        if not pace.is_worth(chance * likely):
            break
    pace.end()
    clock.now_s += pass_s
    pace.checked(round(sum(likely**depth for depth in range(1, levels + 1))))
    return levels


def settled(clock: Clock, *, level_s: float, pass_s: float, likely: float = 0.8) -> int:
    pace = Pace()
    found = [
        levels_of(pace, clock, level_s=level_s, pass_s=pass_s, likely=likely) for _ in range(6)
    ]
    assert found[0] == 40  # nothing is known of the times yet
    return found[-1]


def test_a_slow_disk_has_deeper_trees_than_a_fast_link(clock: Clock) -> None:
    slow, fast, none = (
        settled(clock, level_s=0.005, pass_s=pass_s) for pass_s in (12.0, 0.7, 0.006)
    )
    assert none < fast < slow
    assert none <= 2

    def tokens_a_second(levels: int, pass_s: float) -> float:
        tokens = sum(0.8**depth for depth in range(levels + 1))
        return tokens / (pass_s + 0.005 * levels)

    for levels, pass_s in ((slow, 12.0), (fast, 0.7)):
        best = max(tokens_a_second(other, pass_s) for other in range(1, 41))
        assert tokens_a_second(levels, pass_s) >= 0.98 * best


def test_a_draft_that_is_never_right_is_not_let_grow(clock: Clock) -> None:
    pace = Pace()
    for _ in range(60):
        pace.begin()
        clock.now_s += 0.005
        pace.level(0.9)
        pace.is_worth(0.8)
        pace.end()
        clock.now_s += 0.7
        pace.checked(0)
    assert levels_of(pace, clock, level_s=0.005, pass_s=0.7, likely=0.9) < settled(
        clock, level_s=0.005, pass_s=0.7, likely=0.9
    )
