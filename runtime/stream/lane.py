"""The device's slots, and the order between the copies into them and the work that reads them.

A lane knows two orders of execution: copies, and computation. `CudaLane` makes them CUDA streams
with events between them; `HostLane` runs everything at once on the CPU. The stream above it is
the same for both.
"""

from __future__ import annotations

from typing import Protocol

import torch

from layerpack.runtime.core.device_errors import device_errors
from layerpack.runtime.stream.ring import Fence


class Lane(Protocol):
    """Slot k: free -begin_copy, copy …, end_copy-> ready -wait_ready, compute, mark_free-> free."""

    slots: list[torch.Tensor]

    def begin_copy(self, slot: int) -> None:
        """Order the copies that follow after the computation that last read `slot`. Waits not."""

    def copy(self, slot: int, offset_bytes: int, source: torch.Tensor) -> None:
        """Order a copy of `source` (uint8, host) to `slot` from `offset_bytes` on. Waits not."""

    def end_copy(self, slot: int) -> None:
        """Mark that `slot` is whole once the copies so far have run. Waits not."""

    def fence(self) -> Fence:
        """A point after the copies so far, for the owner of their sources."""

    def wait_ready(self, slot: int) -> None:
        """Order the computation that follows after `slot`'s copies. Waits not."""

    def mark_free(self, slot: int) -> None:
        """Mark that `slot` may be overwritten once the computation so far has run. Waits not."""

    def drain(self) -> None:
        """Wait for every copy and computation ordered so far."""


class HostLane:
    """CPU slots; every order is the order of the calls."""

    def __init__(self, *, num_slots: int, slot_bytes: int) -> None:
        self.slots = [torch.empty(slot_bytes, dtype=torch.uint8) for _ in range(num_slots)]

    def begin_copy(self, slot: int) -> None:
        """Nothing to order."""

    def copy(self, slot: int, offset_bytes: int, source: torch.Tensor) -> None:
        """Copies at once."""
        self.slots[slot][offset_bytes : offset_bytes + source.numel()].copy_(source)

    def end_copy(self, slot: int) -> None:
        """Nothing to order."""

    def fence(self) -> Fence:
        """Already passed."""
        return PassedFence()

    def wait_ready(self, slot: int) -> None:
        """Nothing to order."""

    def mark_free(self, slot: int) -> None:
        """Nothing to order."""

    def drain(self) -> None:
        """Nothing to wait for."""


class PassedFence:
    """A point that was passed before anybody asked."""

    def wait(self) -> None:
        """Already passed."""


class CudaLane:
    """GPU slots, a copy stream, two events per slot: `ready` (copies done), `free` (reads done)."""

    def __init__(self, *, device: torch.device, num_slots: int, slot_bytes: int) -> None:
        self._device = device
        self._copy_stream = torch.cuda.Stream(device)
        self.slots = [
            torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(num_slots)
        ]
        self._ready = [torch.cuda.Event() for _ in range(num_slots)]
        self._free = [torch.cuda.Event() for _ in range(num_slots)]
        # The allocator may hand out memory that earlier work on the compute stream still uses.
        for event in self._free:
            event.record(torch.cuda.current_stream(device))

    @property
    def copy_stream(self) -> torch.cuda.Stream:
        """Where the copies run, for whoever times them."""
        return self._copy_stream

    def begin_copy(self, slot: int) -> None:
        """The copy stream waits for the slot's `free` event."""
        self._copy_stream.wait_event(self._free[slot])

    def copy(self, slot: int, offset_bytes: int, source: torch.Tensor) -> None:
        """An asynchronous copy on the copy stream; `source` must be pinned or registered."""
        with torch.cuda.stream(self._copy_stream):
            target = self.slots[slot][offset_bytes : offset_bytes + source.numel()]
            target.copy_(source, non_blocking=True)

    def end_copy(self, slot: int) -> None:
        """Record the slot's `ready` event on the copy stream."""
        self._ready[slot].record(self._copy_stream)

    def fence(self) -> Fence:
        """An event on the copy stream; waiting for it releases the GIL."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._copy_stream)
        return EventFence(event)

    def wait_ready(self, slot: int) -> None:
        """The compute stream waits for the slot's `ready` event."""
        torch.cuda.current_stream(self._device).wait_event(self._ready[slot])

    def mark_free(self, slot: int) -> None:
        """Record the slot's `free` event on the compute stream."""
        self._free[slot].record(torch.cuda.current_stream(self._device))

    def drain(self) -> None:
        """Wait for both streams."""
        self._copy_stream.synchronize()
        torch.cuda.current_stream(self._device).synchronize()


class EventFence:
    """The point at which a CUDA event happens."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        """Block until the event has happened. Raises StreamError if the device fails."""
        with device_errors("in a copy"):
            self._event.synchronize()
