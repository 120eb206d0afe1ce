"""git-lfs pointers: short texts where large files should be, as in clones without git-lfs."""

from __future__ import annotations

from pathlib import Path

START = b"version https://git-lfs.github.com/spec/"
REMEDY = "only a git-lfs pointer, not the file; fetch it with `git lfs pull`, or download it again"


def is_pointer(first: bytes) -> bool:
    """Whether a file that begins so, with eight bytes at least, is a pointer."""
    return len(first) >= 8 and START.startswith(first[: len(START)])


def is_pointer_file(path: Path) -> bool:
    """Whether an ordinary file is there that holds a pointer. Raises OSError."""
    if not path.is_file():  # a pipe would be waited for
        return False
    with open(path, "rb") as file:
        return is_pointer(file.read(len(START)))
