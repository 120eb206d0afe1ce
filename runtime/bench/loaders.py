"""The loaders that `layerpack bench` compares with: a layer's file as a dict of tensors.

This is how most programs that stream layers do it: safetensors gives a dict, each tensor is pinned
(or not) and copied to fresh device memory, which is dropped after use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from layerpack.formats.errors import PackError
from layerpack.formats.units import align_up
from layerpack.runtime.bench.rows import Method, Pinning
from layerpack.runtime.measure.page_cache import evict

Tensors = dict[str, torch.Tensor]
_TENSOR_ALIGNMENT_BYTES = 64


class Loader(Protocol):
    """Brings the files of a pass to the device, in order, pass after pass."""

    def load(self, place: int) -> Tensors:
        """The tensors of file `place` on the device, whole for work ordered from here on; waits.

        The loader keeps no reference to them. Raises PackError, torch.OutOfMemoryError.
        """

    def close(self) -> None:
        """Join every thread and wait for every copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRead:
    """File -> tensors in host memory. `cold`: from the disk, not from the page cache."""

    pinning: Pinning
    cold: bool

    def __call__(self, path: Path) -> Tensors:
        """Read (or map, when not pinned) all tensors of `path`; blocks. Raises PackError."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self.cold:
            evict(path)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as reason:
            raise PackError(f"{path}: cannot be loaded ({reason}); run layerpack verify") from None
        if self.pinning is Pinning.TENSOR:
            return {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return _in_one_buffer(tensors) if self.pinning is Pinning.BUFFER else tensors


def _in_one_buffer(tensors: Tensors) -> Tensors:
    lengths = {name: align_up(t.nbytes, _TENSOR_ALIGNMENT_BYTES) for name, t in tensors.items()}
    buffer = torch.empty(sum(lengths.values()), dtype=torch.uint8, pin_memory=True)
    views, begin = {}, 0
    for name, tensor in tensors.items():
        raw = buffer[begin : begin + tensor.nbytes]
        views[name] = raw.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        begin += lengths[name]
    return views


def open_loader(
    method: Method, paths: Sequence[Path], device: torch.device, *, cold: bool
) -> Loader:
    """The loader that `method` asks for, of files in the order of a pass."""
    read = HostRead(pinning=method.pinning, cold=cold)
    if method.prefetchers:
        return PrefetchLoader(paths, read, device, num_threads=method.prefetchers)
    return SyncLoader(paths, read, device)


class SyncLoader:
    """Load, copy, wait."""

    def __init__(self, paths: Sequence[Path], read: HostRead, device: torch.device) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._device = device

    def load(self, place: int) -> Tensors:
        """Everything happens here."""
        tensors = _copied(self._read(self._paths[place]), self._device)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return tensors

    def close(self) -> None:
        """Nothing is under way."""


class PrefetchLoader:
    """Threads load, pin and copy the next `num_threads` files, across the end of a pass."""

    def __init__(
        self, paths: Sequence[Path], read: HostRead, device: torch.device, *, num_threads: int
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._device = device
        self._ahead = num_threads
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="layerpack-prefetch")
        self._pending: deque[Future[tuple[Tensors, Any]]] = deque()
        self._submitted = 0
        self._taken = 0

    def load(self, place: int) -> Tensors:
        """Waits for the threads, and orders the computation after the copy."""
        assert place == self._taken % len(self._paths), "files are loaded in the order of a pass"
        while self._submitted < self._taken + self._ahead:
            self._submit()
        tensors, copied = self._pending.popleft().result()
        self._taken += 1
        self._submit()
        if copied is not None:
            compute = torch.cuda.current_stream(self._device)
            compute.wait_event(copied)
            for tensor in tensors.values():
                tensor.record_stream(compute)  # else its memory would be used again too early
        return tensors

    def _submit(self) -> None:
        path = self._paths[self._submitted % len(self._paths)]
        self._pending.append(self._pool.submit(self._prefetch, path))
        self._submitted += 1

    def _prefetch(self, path: Path) -> tuple[Tensors, Any]:
        tensors = self._read(path)
        if self._stream is None:
            return _copied(tensors, self._device), None
        with torch.cuda.stream(self._stream):
            on_device = _copied(tensors, self._device)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return on_device, copied

    def close(self) -> None:
        """Drop what is ahead, join the threads, wait for the copies."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        if self._stream is not None:
            self._stream.synchronize()


def _copied(tensors: Tensors, device: torch.device) -> Tensors:
    return {
        name: tensor.to(device, non_blocking=True, copy=True) for name, tensor in tensors.items()
    }
