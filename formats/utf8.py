"""Text that came in as other bytes than UTF-8, which Python carries along as lone surrogates."""

from __future__ import annotations

from layerpack.formats.errors import PromptError


def require_utf8(text: str, where: str) -> None:
    """Raises PromptError, naming `where`, if `text` cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as reason:
        raise PromptError(
            f"{where} is not UTF-8 text (character {reason.start + 1} is the first wrong one); "
            "give it as UTF-8"
        ) from None
