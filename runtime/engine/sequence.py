"""One sequence of one network: the tokens in its KV cache, and the passes that extend it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from layerpack.libraries.transformers_rope import Rope
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.engine.step import step
from layerpack.runtime.plan.needs import PREFILL_TOKENS
from layerpack.runtime.trace.steps import Steps

Check = Callable[[], contextlib.AbstractContextManager[object]]


class CachedSequence:
    """`extend` runs what the cache lacks; `forget` takes back tokens that were only tried.

    Make one with `opened`; one at a time for a network, as some rotary embeddings follow the length
    of the sequence at hand.
    """

    def __init__(
        self, network: Any, *, max_tokens: int, patience: Patience, steps: Steps | None = None
    ) -> None:
        self._network, self._max_tokens = network, max_tokens
        self._patience, self._steps = patience, steps
        self._rope = Rope(network)
        self._known = 0
        self._forgets = False
        self._cache: Any = None

    @classmethod
    @contextmanager
    def opened(
        cls, network: Any, *, max_tokens: int, patience: Patience, steps: Steps | None = None
    ) -> Iterator[CachedSequence]:
        """With room for `max_tokens` tokens; the cache goes with the block."""
        sequence = cls(network, max_tokens=max_tokens, patience=patience, steps=steps)
        with sequence._rope.sequence():
            try:
                yield sequence
            finally:
                sequence._cache = None

    def room(self, num_tokens: int) -> int | None:
        """How many tokens may be tried behind `num_tokens` in one pass; None: any number."""
        return self._rope.room(num_tokens)

    def extend(
        self, ids: Sequence[int], *, rows: int = 1, check: Check | None = None
    ) -> torch.Tensor:
        """Run the tokens of the whole sequence `ids` that the cache lacks, in one pass or several.

        Returns the logits (rows, vocabulary) of the last `rows` of them. `check` makes the context
        of a pass of several rows behind a prompt. Raises StreamError, CancelledError.
        """
        room = self._rope.room(self._known)
        is_prompt = not self._known or (room is not None and len(ids) - self._known > room)
        forgets = self._forgets
        if is_prompt:
            self._start(len(ids))
        with contextlib.ExitStack() as around:
            if is_prompt:
                around.enter_context(self._rope.prompt(len(ids)))
            elif check is not None and rows > 1:
                around.enter_context(check())
            while True:
                self._patience.check()
                begin_s = time.perf_counter()
                piece = ids[self._known : self._known + PREFILL_TOKENS]
                is_last = self._known + len(piece) == len(ids)
                tokens = torch.tensor([list(piece)], device=self._network.device)
                logits = step(self._network, tokens, self._cache, rows=rows if is_last else 1)
                self._known += len(piece)
                if self._steps is not None:
                    self._steps.ran(len(piece), begin_s)
                if is_last:
                    break
                if self._steps is not None:
                    self._steps.known(0)
        if is_prompt and forgets:
            self.may_forget()
        return logits

    def forget(self, count: int) -> None:
        """Take the last `count` tokens back; only what the last `extend` brought.

        To be called after each pass that may be taken back, with 0 as well.
        """
        if not self._forgets:
            return
        self._cache.crop(-count)
        self._known -= count

    def may_forget(self) -> None:
        """From here on the cache keeps what `forget` needs."""
        self._cache.activate_past_recording()
        self._forgets = True

    def _start(self, num_tokens: int) -> None:
        from layerpack.runtime.kv.reserved import reserved_cache  # late: it imports transformers

        self._cache = reserved_cache(self._network.config, max(self._max_tokens, num_tokens))
        self._known, self._forgets = 0, False
