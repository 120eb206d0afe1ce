"""A device that fails: one clear line in place of CUDA's own words, and closing that still closes.

After most CUDA errors every later call in the process fails, too, in any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layerpack.formats.errors import StreamError
from layerpack.formats.text import first_line


def is_device_error(error: BaseException) -> bool:
    """Whether CUDA itself failed. What cuBLAS reports comes as a plain RuntimeError."""
    return isinstance(error, torch.AcceleratorError) or (
        type(error) is RuntimeError and str(error).startswith("CUDA error:")
    )


def device_failed(doing: str, error: BaseException) -> StreamError:
    """The error to raise: what happened `doing` (in a pass, while …), and what to do."""
    reason = (str(error).strip().splitlines() or [repr(error)])[0]
    if "out of memory" in reason or "ALLOC_FAILED" in reason:  # not by way of torch's allocator
        return StreamError(
            f"the device ran out of memory {doing} ({reason}); end what else uses the device, "
            "or lower --vram"
        )
    return StreamError(
        f"the device failed {doing} ({reason}); start the program again, and if that does not "
        "help look into the system's log (dmesg)"
    )


def out_of_memory(error: Exception) -> StreamError:
    """The error to raise where torch's allocator had too little in a pass."""
    return StreamError(
        f"the device ran out of memory in a pass ({first_line(error)}); "
        "lower --context, or keep fewer layers resident with a lower --vram"
    )


@contextmanager
def device_errors(doing: str) -> Iterator[None]:
    """A failure of the device inside the block becomes StreamError; also a decorator."""
    try:
        yield
    except RuntimeError as error:
        if is_device_error(error):
            raise device_failed(doing, error) from error
        raise


@contextmanager
def failed_device_ignored() -> Iterator[None]:
    """For closing: a failed device runs nothing any more, and must not hide what came first.

    Whoever uses it next is told.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_device_error(error):
            raise
