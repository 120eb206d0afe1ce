"""Text from outside: bytes that were not UTF-8, what a terminal would obey, names, errors."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from layerpack.formats.errors import PromptError

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16's does, so it stands before it
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def require_utf8(text: str, where: str) -> None:
    """Raises PromptError, naming `where`, if `text` cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as reason:
        raise PromptError(
            f"{where} is not UTF-8 text (character {reason.start + 1} is the first wrong one); "
            "give it as UTF-8"
        ) from None


def decode_text(raw: bytes, where: str) -> str:
    """The text that a file or a pipe holds, without its byte order mark. Raises PromptError.

    A mark says how the text is encoded; without one it is UTF-8.
    """
    encoding = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as reason:
        raise PromptError(
            f"{where}: not {encoding.upper().removesuffix('-SIG')} text (byte {reason.start + 1} "
            "is the first wrong one); save it as UTF-8"
        ) from None


def without_mark(raw: bytes, where: str) -> bytes:
    """The same text as UTF-8 without a mark; bytes without one stay. Raises PromptError."""
    return decode_text(raw, where).encode() if raw.startswith(tuple(_MARKS)) else raw


def is_repo_id(name: str) -> bool:
    """Whether a repository on the Hub can have the name: `owner/name`, or `name` alone."""
    return _REPO_ID.fullmatch(name) is not None


def without_path(error: Exception, path: Path) -> str:
    """The error in words, for a message that begins with `path`: an OSError's own repeat it."""
    if isinstance(error, OSError) and str(error).endswith(f": {str(path)!r}"):
        return error.strerror or ""
    return str(error)


def printable(text: str) -> str:
    """The text on one line, what is not printable escaped, as in `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line of bounded length: its first, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else repr(error)
