"""Slices that stay on the device: read once, by threads, through pinned buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from layerpack.formats.read import Reader
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.stream.lane import EventFence, PassedFence
from layerpack.runtime.stream.pinned import PinnedBuffers
from layerpack.runtime.stream.ring import Fence, ReadRing

_BUFFER_BYTES, _NUM_BUFFERS, _NUM_THREADS = 16 << 20, 12, 8


def load_vram(
    slices: Sequence[Slice], reader: Reader, device: torch.device, patience: Patience
) -> dict[int, torch.Tensor]:
    """Each slice's bytes (uint8) on `device`, by index; waits.

    `reader` had better go through the page cache: a pack that was just used or written is still
    there. Raises StreamError, CancelledError.
    """
    extents = [(part, extent) for part in slices for extent in part.extents(_BUFFER_BYTES)]
    if not extents:
        return {}
    tensors = {
        part.index: torch.empty(part.length_bytes, dtype=torch.uint8, device=device)
        for part in slices
    }
    with contextlib.ExitStack() as stack:  # each is closed, whatever closing another one raises
        buffers = PinnedBuffers(
            count=min(_NUM_BUFFERS, len(extents)), each_bytes=_BUFFER_BYTES, device=device
        )
        stack.callback(buffers.close)
        stack.callback(lambda: _copies_so_far(device).wait())
        ring = ReadRing.over(
            [extent for _, extent in extents],
            buffers=buffers.views,
            reader=reader,
            num_threads=_NUM_THREADS,
        )
        stack.enter_context(ring)
        for (part, _), (extent, view) in zip(extents, ring.take_all(patience), strict=True):
            begin = extent.offset_bytes - part.offset_bytes
            target = tensors[part.index][begin : begin + extent.length_bytes]
            target.copy_(torch.frombuffer(view, dtype=torch.uint8), non_blocking=True)
            ring.release(_copies_so_far(device))
    return tensors


def _copies_so_far(device: torch.device) -> Fence:
    """The point that the current stream has reached; on a CPU it is there already."""
    if device.type != "cuda":
        return PassedFence()
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return EventFence(event)
