"""Proposals without a model: what followed the last time that the text ended as it does now.

Source: Saxena, Prompt Lookup Decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 3, 1


class Lookup:
    """Remembers where each run of one to three tokens of a sequence was last seen."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `ids`, an extension of what was given before."""
        for end in range(self._seen, len(ids) - 1):  # but for the end itself
            for length in range(_SHORTEST, min(_LONGEST, end + 1) + 1):
                self._ends[tuple(ids[end + 1 - length : end + 1])] = end + 1
        self._seen = max(self._seen, len(ids) - 1)
        for length in range(min(_LONGEST, len(ids)), _SHORTEST - 1, -1):
            follows = self._ends.get(tuple(ids[len(ids) - length :]))
            if follows is not None:
                return list(ids[follows : follows + most])
        return []
