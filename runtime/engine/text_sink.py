"""From token ids to text, piece by piece as it becomes certain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class TextSink:
    """Collects ids, and hands on text that cannot change any more.

    A token may hold part of a character; what is not yet a whole one is held back, and left out at
    the end of it all.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self.token_ids: list[int] = []
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._sent = 0

    @property
    def text(self) -> str:
        """All whole characters so far."""
        # Without the clean-up of spaces, which would change text that was handed on already.
        text = self._tokenizer.decode(
            self.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).rstrip("\ufffd")

    def put(self, ids: Sequence[int]) -> None:
        """Take the next tokens."""
        self.token_ids += ids
        if self._on_text is None:
            return
        text = self.text
        if len(text) > self._sent:
            piece, self._sent = text[self._sent :], len(text)
            self._on_text(piece)
