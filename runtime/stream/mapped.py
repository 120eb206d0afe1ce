"""Files mapped into memory, and their pages brought there before a use needs them."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from layerpack.formats.errors import StreamError
from layerpack.formats.text import without_path
from layerpack.runtime.core.slices import Slice

_MADV_WILLNEED, _MADV_POPULATE_READ = 3, 22
_NOT_KNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOMEM, errno.EINTR, errno.EAGAIN}


def map_slice(part: Slice) -> torch.Tensor:
    """The slice's bytes as a read-only mapping (uint8, CPU). Raises StreamError."""
    return map_bytes(part.path, part.offset_bytes, part.length_bytes)


def map_bytes(path: Path, offset_bytes: int, length_bytes: int) -> torch.Tensor:
    """Bytes of a file as a shared read-only mapping (uint8, CPU). Raises StreamError."""
    first = offset_bytes // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        with open(path, "rb") as file:
            mapping = mmap.mmap(
                file.fileno(),
                offset_bytes + length_bytes - first,
                access=mmap.ACCESS_READ,
                offset=first,
            )
    except (OSError, ValueError) as reason:
        why = without_path(reason, path)
        raise StreamError(
            f"{path}: cannot map {length_bytes} bytes from {offset_bytes} ({why}); "
            "run `layerpack verify`"
        ) from reason
    with warnings.catch_warnings():
        # The mapping is read-only and nothing writes to it.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        whole = torch.from_numpy(np.frombuffer(mapping, dtype=np.uint8))
    return whole[offset_bytes - first :]


def advise_needed(tensor: torch.Tensor) -> None:
    """Ask the kernel to read a mapping's pages ahead. Waits not; a refusal is harmless."""
    _madvise(tensor, _MADV_WILLNEED)


def populate(tensor: torch.Tensor, what: str) -> None:
    """Bring a mapping's pages into memory, so that a use finds them there; waits.

    The kernel can only kill a process that touches a page which cannot be read. Asked in advance
    (Linux 5.14 and newer), it says so: raises StreamError, with `what` in it.
    """
    code = _madvise(tensor, _MADV_POPULATE_READ)
    if code and code not in _NOT_KNOWN:
        raise StreamError(
            f"{what}: its mapped file cannot be read ({os.strerror(code)}; a read error, or the "
            "file has become shorter); run `layerpack verify`"
        )


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _madvise(tensor: torch.Tensor, advice: int) -> int:
    """0, or the error's number. Releases the GIL."""
    if os.name != "posix" or not tensor.numel():
        return 0
    page = mmap.PAGESIZE
    first = tensor.data_ptr() // page * page
    length = tensor.data_ptr() + tensor.numel() - first
    arguments = ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(advice)
    return ctypes.get_errno() if _libc().madvise(*arguments) else 0
