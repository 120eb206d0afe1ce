"""A text as the windows of tokens that a model is judged by, as llama.cpp's perplexity takes them.

Windows follow one another without overlap. Of each the tokens of its second half are scored, with
all those before them in the window known. What is left at the end of the text is left out.
Source: https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerpack.formats.errors import PromptError
from layerpack.formats.text import decode_text, first_line

SHIPPED_TEXT = "alice.txt"
"""The beginning of Lewis Carroll's Alice's Adventures in Wonderland (1865), 64 kB."""
LEAST_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """`ids`: int64 (windows, tokens), each window with the model's first token before it."""

    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        """Of each window."""
        return self.ids.shape[1]

    @property
    def num_scored(self) -> int:
        """How many tokens of each window are scored: its last ones."""
        return self.num_tokens - self.num_tokens // 2 - 1

    @property
    def scored(self) -> torch.Tensor:
        """The tokens that are scored: (windows, num_scored)."""
        return self.ids[:, -self.num_scored :]


def read_text(path: Path | None) -> str:
    """The text of a file, or the one that comes with the package. Raises PromptError."""
    if path is None:
        file = importlib.resources.files("layerpack.runtime.quality") / SHIPPED_TEXT
        return file.read_text(encoding="utf-8")
    try:
        raw = path.read_bytes()
    except OSError as reason:
        raise PromptError(f"{path}: cannot be read ({reason.strerror})") from reason
    return decode_text(raw, str(path))


def windows_of(
    text: str, tokenizer: Any, *, num_tokens: int, most: int | None = None, where: str
) -> Windows:
    """The text's windows of `num_tokens` tokens, at most so many; `where` names it in errors.

    Where a tokenizer puts a first token before a text, each window begins with it. Raises
    PromptError if there is not one whole window.
    """
    if num_tokens < LEAST_TOKENS:
        raise PromptError(
            f"windows of {num_tokens} tokens score nothing; give {LEAST_TOKENS} or more"
        )
    try:
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        first = tokenizer("a").input_ids[:1]
    except Exception as reason:  # a tokenizer's own
        raise PromptError(f"{where}: cannot be read as tokens ({first_line(reason)})") from reason
    begins = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    if begins:
        ids = first + ids
    count = len(ids) // num_tokens
    if not count:
        raise PromptError(
            f"{where}: {len(ids)} tokens, not one window of {num_tokens}; "
            "give a longer text, or smaller windows with --window"
        )
    found = torch.tensor(ids[: count * num_tokens]).view(count, num_tokens)[:most].clone()
    if begins:
        found[:, 0] = first[0]
    return Windows(ids=found)
