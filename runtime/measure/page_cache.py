"""The system's page cache, where a measurement wants the disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def evict(path: Path) -> None:
    """Ask the kernel to drop the file from the page cache; waits for what is not written yet.

    A refusal is harmless.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages of a file that was just written, or copied, stay else
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
