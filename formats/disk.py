"""What a file system is asked for beside the bytes: files that are whole, names that stay."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
PARTIAL_SUFFIX = ".partial"
"""After the name of a file that is being written."""


def write_whole(path: Path, data: bytes) -> None:
    """Write one small file; on the disk when this returns. Raises OSError.

    Until then the old one stands under the name, also for other processes that write it.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def is_full(error: BaseException | None) -> bool:
    """Whether an error is the disk's or the quota's end."""
    return isinstance(error, OSError) and error.errno in _FULL


def sync_directory(path: Path) -> None:
    """Bring a directory's entries to the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as reason:
        if reason.errno != errno.EINVAL:  # so say some network file systems, of directories only
            raise
    finally:
        os.close(handle)


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Whether no other process has the lock, as far as the system can tell."""
    try:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows; a file system without locks, as Lustre often is
        return True
    return True
