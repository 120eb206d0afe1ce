"""A directory for a while beside a pack; what a killed run left of one goes with the next run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerpack.formats.disk import try_lock
from layerpack.formats.errors import TargetError

PREFIX = "layerpack-eval-"
_LOCK = "lock"


@contextmanager
def scratch_beside(pack: Path) -> Iterator[Path]:
    """The directory is this run's alone and is gone after the block. Raises TargetError."""
    room = pack.absolute().parent
    for left in room.glob(f"{PREFIX}*/{_LOCK}"):
        if _is_left(left):
            shutil.rmtree(left.parent, ignore_errors=True)
    try:
        found = Path(tempfile.mkdtemp(dir=room, prefix=PREFIX))
    except OSError as reason:
        raise TargetError(
            f"{room}: nothing can be written beside the pack ({reason.strerror}); name a place "
            "for the reference's logits with --logits"
        ) from reason
    new = found / f"{_LOCK}.new"
    lock = os.open(new, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try_lock(lock)
        os.rename(new, found / _LOCK)  # others look for that name: never for one that is unlocked
        yield found
    finally:
        os.close(lock)
        shutil.rmtree(found, ignore_errors=True)


def _is_left(lock: Path) -> bool:
    """Whether whoever made it has ended."""
    try:
        handle = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        return try_lock(handle)
    finally:
        os.close(handle)
