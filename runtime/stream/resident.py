"""Loading the slices that stay on the device: read once, by threads, through pinned buffers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import torch

from layerpack.formats.read import Reader
from layerpack.runtime.core.device_errors import device_errors
from layerpack.runtime.core.interrupts import stop_if
from layerpack.runtime.core.pieces import split
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.stream.host import PinnedBuffers
from layerpack.runtime.stream.ring import ReadRing

_PIECE_BYTES, _NUM_BUFFERS, _NUM_THREADS = 16 << 20, 12, 8


def load_resident(
    slices: Sequence[Slice],
    reader: Reader,
    device: torch.device,
    *,
    watchdog_s: float,
    cancelled: threading.Event | None = None,
) -> dict[int, torch.Tensor]:
    """Each slice's bytes (uint8) on `device`, by index; blocks, until `cancelled` at the latest.

    `reader` had better go through the page cache: a pack that was just used or written is still
    there. Raises StreamError.
    """
    cancelled = cancelled or threading.Event()
    pieces = [(part, piece) for part in slices for piece in split(part, _PIECE_BYTES)]
    if not pieces:
        return {}
    tensors = {
        part.index: torch.empty(part.length_bytes, dtype=torch.uint8, device=device)
        for part in slices
    }
    with contextlib.ExitStack() as stack:  # each is closed, whatever closing another one raises
        buffers = PinnedBuffers(
            count=min(_NUM_BUFFERS, len(pieces)), each_bytes=_PIECE_BYTES, device=device
        )
        stack.callback(buffers.close)
        stack.callback(lambda: _CurrentStream(device).wait())
        ring = ReadRing(
            buffers=buffers.views,
            reader=reader,
            piece_of=lambda ticket: pieces[ticket][1],
            num_threads=_NUM_THREADS,
            num_tickets=len(pieces),
        )
        stack.enter_context(ring)
        for part, _ in pieces:
            stop_if(cancelled)
            piece, view = ring.take(timeout_s=watchdog_s)
            offset = piece.offset_bytes - part.offset_bytes
            source = torch.frombuffer(view, dtype=torch.uint8)
            tensors[part.index][offset : offset + piece.length_bytes].copy_(
                source, non_blocking=True
            )
            ring.release(_CurrentStream(device))
    return tensors


class _CurrentStream:
    """The point that the current stream has reached, as a fence."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Block until the stream is past the point. Raises StreamError if the device fails."""
        if self._event is not None:
            with device_errors("in a copy"):
                self._event.synchronize()
