"""From token ids to text, piece by piece as it becomes certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextSink:
    """Collects ids, and gives text that cannot change any more.

    A token may hold part of a character; what is not yet a whole one is held back, and left out at
    the end of it all. So is what may become one of the `stop` strings, before which the text ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.token_ids: list[int] = []
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._sent = 0
        self._end: int | None = None  # of the text, where a stop string begins

    @property
    def text(self) -> str:
        """All whole characters so far."""
        # Without the clean-up of spaces, which would change text that was handed on already.
        text = self._tokenizer.decode(
            self.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).rstrip("\ufffd")[: self._end]

    def put(self, ids: Sequence[int]) -> str:
        """Take the next tokens; the text that is certain now and was not before."""
        self.token_ids += ids
        text = self.text
        for stop in self._stop:
            begin = text.find(stop, max(0, self._sent - len(stop)))
            if begin >= 0 and (self._end is None or begin < self._end):
                self._end, self.stopped = begin, True
        text = text[: self._end]
        return self._send(text, len(text) if self.stopped else len(text) - self._held_back(text))

    def rest(self) -> str:
        """The text is over: what was held back for a stop string."""
        text = self.text
        return self._send(text, len(text))

    def _send(self, text: str, end: int) -> str:
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _held_back(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop):
                return count
        return 0
