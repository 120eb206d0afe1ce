"""How deep a tree is worth growing: what another level may give against the time that it takes."""

from __future__ import annotations

import time

_PRIOR_TOKENS = 4.0  # what a draft says of itself counts as so many accepted tokens do
_NEWEST = 0.3  # how much the newest time counts


class Pace:
    """The times of one generation's passes and of its draft's levels, and how good the draft is.

    A level is worth its time if the tokens that it may add, by the draft's own probabilities and by
    how right these have been, come faster than tokens do without it.
    """

    def __init__(self) -> None:
        self._pass_s: float | None = None
        self._level_s: float | None = None
        self._foreseen = self._accepted = _PRIOR_TOKENS
        self._begin_s = self._grown_s = 0.0
        self._growing = 0.0

    def begin(self) -> None:
        """A tree begins to grow."""
        self._begin_s = self._grown_s = time.perf_counter()
        self._growing = 0.0

    def level(self, likely: float) -> None:
        """A level has grown; with probability `likely` one of its nodes is right."""
        now_s = time.perf_counter()
        self._level_s = _smooth(self._level_s, now_s - self._grown_s)
        self._grown_s = now_s
        self._growing += likely

    def is_worth(self, likely: float) -> bool:
        """Whether another level is, one of whose nodes is right with probability `likely`."""
        if self._pass_s is None or self._level_s is None:
            return True
        scale = self._accepted / self._foreseen
        spent_s = self._pass_s + time.perf_counter() - self._begin_s
        tokens = 1 + scale * self._growing
        return scale * likely * spent_s > tokens * self._level_s

    def end(self) -> None:
        """The tree is grown; the pass that checks it begins."""
        self._grown_s = time.perf_counter()

    def checked(self, num_right: int) -> None:
        """The pass is over."""
        self._pass_s = _smooth(self._pass_s, time.perf_counter() - self._grown_s)
        self._foreseen += self._growing
        self._accepted += num_right


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else before + _NEWEST * (now - before)
