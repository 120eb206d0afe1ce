"""Pinned host memory and a stream for each thread that hands work to a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Staging:
    """Runs `encode` on `device`. Every thread has a stream of its own.

    What is pinned already is copied from and to where it is. For the rest a thread has buffers,
    which grow to what it has needed so far.
    """

    def __init__(self, device: torch.device, encode: Encode) -> None:
        self._device, self._encode = device, encode
        self._own = threading.local()

    def encode(self, blocks: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
        """Fill `codes` (uint8) and `absmax` (float32), both on the CPU; waits until they are.

        `blocks` is contiguous, on the CPU or on the device.
        """
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)
            self._own.pinned = {}
        stream = self._own.stream
        if blocks.device.type == "cuda":
            stream.wait_stream(torch.cuda.current_stream(self._device))
        elif not blocks.is_pinned():
            blocks = self._pinned("blocks", blocks).copy_(blocks)
        targets = {"codes": codes, "absmax": absmax}
        staged = {
            role: target if target.is_pinned() else self._pinned(role, target)
            for role, target in targets.items()
        }
        with torch.cuda.stream(stream):
            results = self._encode(blocks.to(self._device, non_blocking=True))
            for buffer, result in zip(staged.values(), results, strict=True):
                buffer.copy_(result.view(buffer.shape), non_blocking=True)
        stream.synchronize()
        for role, target in targets.items():
            if staged[role] is not target:
                target.copy_(staged[role])

    def _pinned(self, role: str, like: torch.Tensor) -> torch.Tensor:
        """This thread's pinned buffer for a role, in the shape and dtype of `like`."""
        length_bytes = like.numel() * like.element_size()
        raw = self._own.pinned.get(role)
        if raw is None or raw.numel() < length_bytes:
            raw = torch.empty(length_bytes, dtype=torch.uint8, pin_memory=True)
            self._own.pinned[role] = raw
        buffer: torch.Tensor = raw[:length_bytes].view(like.dtype).view(like.shape)
        return buffer
