"""Page-aligned host memory that a device copies from."""

from __future__ import annotations

import mmap
import os

import numpy as np
import torch

from layerpack.formats.errors import CapacityError
from layerpack.formats.units import human_bytes
from layerpack.libraries.torch_api import register_host, unregister_host


class PinnedBuffers:
    """`count` buffers, pinned where the device is a GPU, plain memory otherwise.

    Anonymous mappings registered with CUDA rather than torch's pinned allocator, which rounds
    sizes up to powers of two and does not promise page alignment for direct reads.
    """

    def __init__(self, *, count: int, each_bytes: int, device: torch.device) -> None:
        """Raises CapacityError where the system refuses the memory, or to pin it."""
        self._registered: list[int] = []
        self.tensors: list[torch.Tensor] = []
        try:
            for _ in range(count):
                tensor = _anonymous(each_bytes)
                if device.type == "cuda":
                    if code := register_host(tensor):
                        raise CapacityError(
                            f"cannot pin {human_bytes(each_bytes)} of host memory (CUDA error "
                            f"{code}); lower --ram or raise the locked-memory limit (ulimit -l)"
                        )
                    self._registered.append(tensor.data_ptr())
                self.tensors.append(tensor)
        except BaseException:
            self.close()
            raise

    @property
    def views(self) -> list[memoryview]:
        """The same memory for readers."""
        return [memoryview(tensor.numpy().data) for tensor in self.tensors]

    def close(self) -> None:
        """Unregister; nothing may be copying any more."""
        for address in self._registered:
            unregister_host(address)
        self._registered.clear()
        self.tensors.clear()


def _anonymous(length_bytes: int) -> torch.Tensor:
    try:
        if os.name == "posix":
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            memory = mmap.mmap(-1, length_bytes, flags=flags)
        else:
            memory = mmap.mmap(-1, length_bytes)
    except OSError as reason:
        raise CapacityError(
            f"cannot take {human_bytes(length_bytes)} of host memory ({reason.strerror}); "
            "lower --ram"
        ) from reason
    return torch.from_numpy(np.frombuffer(memory, dtype=np.uint8))
