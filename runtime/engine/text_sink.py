"""From token ids to text, piece by piece as it becomes certain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class TextSink:
    """transformers' streamer protocol: collects ids, and hands on text that cannot change any more.

    A token may hold part of a character; what is not yet a whole one is held back, and left out at
    the end of it all.
    """

    def __init__(
        self,
        tokenizer: Any,
        on_text: Callable[[str], None] | None,
        *,
        on_ids: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.token_ids: list[int] = []
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._on_ids = on_ids
        self._prompt_seen = False
        self._sent = 0

    @property
    def text(self) -> str:
        """All whole characters so far."""
        # Without the clean-up of spaces, which would change text that was handed on already.
        text = self._tokenizer.decode(
            self.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).rstrip("\ufffd")

    def expect_prompt(self) -> None:
        """What `put` gets next are known ids again, as at the start of each generation."""
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt's ids first, then with each new token or run of tokens."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        ids = value.reshape(-1).tolist()
        self.token_ids += ids
        self._on_ids(len(ids))
        if self._on_text is None:
            return
        text = self.text
        if len(text) > self._sent:
            piece, self._sent = text[self._sent :], len(text)
            self._on_text(piece)

    def end(self) -> None:
        """Called when generation is over."""
