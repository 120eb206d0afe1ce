"""How much context `generate` sets memory aside for: what a run can need; the rest is weights'.

Only a tokenizer knows how many tokens a prompt has, and it comes with transformers: seconds of
importing, in which weights could be loaded already. So a short prompt is bounded without one; its
tokens are counted while the weights are on their way.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from dataclasses import replace
from typing import Any

from layerpack.formats.pack import Pack
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.prompt import encode_prompt, most_tokens, tokens_left
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.needs import context_limit
from layerpack.runtime.tokenizer import load_tokenizer
from layerpack.runtime.trace.trace import Trace


class Room:
    """`context_tokens` to set memory aside for: the user's word, a bound, or a count."""

    def __init__(
        self, pack: Pack, prompt: str, wanted: GenerateOptions, *, reserved: int | None
    ) -> None:
        """`reserved` is what the user asks for. Raises PromptError, PackError, if it counts."""
        self._pack, self._prompt, self._wanted, self._reserved = pack, prompt, wanted, reserved
        self._limit = context_limit(pack)
        bound = most_tokens(prompt, wanted)
        if reserved is not None:
            self.context_tokens = reserved
        elif bound is not None:
            whole = bound + wanted.max_new_tokens
            self.context_tokens = whole if self._limit is None else min(whole, self._limit)
        else:
            self.context_tokens = self.needed_tokens

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The pack's."""
        return load_tokenizer(self._pack.path)

    @functools.cached_property
    def wanted(self) -> GenerateOptions:
        """What to generate, with no more new tokens than there is context for.

        Opening bounds a run only where it sets memory aside; `reserved` bounds it on a CPU as well.
        """
        new_tokens = tokens_left(
            self._prompt_tokens,
            self._wanted.max_new_tokens,
            limit=self._limit,
            reserved=self._reserved,
        )
        return replace(self._wanted, max_new_tokens=new_tokens)

    @property
    def needed_tokens(self) -> int:
        """Counted. Raises PromptError, PackError."""
        return self._prompt_tokens + self.wanted.max_new_tokens

    def check(self) -> None:
        """Raises NoRoomError if what is set aside is too little; PromptError, PackError."""
        if self.needed_tokens > self.context_tokens:
            raise NoRoomError

    @functools.cached_property
    def _prompt_tokens(self) -> int:
        return int(encode_prompt(self.tokenizer, self._prompt, self._wanted).shape[1])


class NoRoomError(Exception):
    """A chat template made more tokens than was thought possible. Never leaves this module."""


def open_with_room(
    stack: contextlib.ExitStack, pack: Pack, opening: OpenOptions, room: Room, trace: Trace
) -> Model:
    """The open model, given to `stack`, its prompt counted. Raises what `Model.open` does."""
    model = None
    with contextlib.suppress(NoRoomError):
        model = stack.enter_context(Model.open(pack, opening, trace=trace, meanwhile=room.check))
    if model is None:
        # Not while the error is handled: its frames, and those that imports left behind, hold on
        # to the first opening's draft, and there may be no room for two.
        gc.collect()
        enough = replace(opening, context_tokens=room.needed_tokens)
        model = stack.enter_context(Model.open(pack, enough, trace=trace))
    model.tokenizer = room.tokenizer
    return model
