"""The steps of a generation: each a pass, from its beginning until its tokens are known."""

from __future__ import annotations

import time
from dataclasses import dataclass

from layerpack.runtime.trace.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One run of the whole model: seconds of the host's, and the tokens that went in."""

    seconds: float
    num_tokens: int


class Steps:
    """begun -proposed-> -ran-> -known-> begun again.

    A GPU is not done when the host has ordered a pass; it is when the host knows the tokens. What
    proposes tokens before a pass belongs to the step. The first passes of a long prompt are steps
    that give no token.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._begin_s = time.perf_counter()
        self.passes: list[Pass] = []

    def proposed(self) -> None:
        """The tokens to try in this step are chosen."""
        self._trace.propose(self._begin_s, time.perf_counter())

    def ran(self, num_tokens: int, begin_s: float) -> None:
        """The host has ordered a pass that it began at `begin_s`."""
        seconds = time.perf_counter() - begin_s
        self.passes.append(Pass(seconds=seconds, num_tokens=num_tokens))

    def known(self, num_tokens: int) -> None:
        """The host has so many new tokens; the next step begins."""
        now_s = time.perf_counter()
        self._trace.step(self._begin_s, now_s, num_tokens)
        self._trace.clock.collect()
        self._begin_s = now_s
