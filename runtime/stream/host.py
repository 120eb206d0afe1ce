"""Host memory that the device copies from: mapped files registered with CUDA, pinned buffers.

A registered mapping is the page cache itself, read by the GPU in place: nothing is copied or
allocated on the host. Where the system refuses to register a mapped file (some do), the bytes are
copied once into pinned memory instead.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from layerpack.formats.errors import CapacityError
from layerpack.formats.read import Reader
from layerpack.formats.units import MIB, human_bytes
from layerpack.runtime.core.interrupts import stop_if
from layerpack.runtime.core.pieces import split
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.stream.mapped import map_slice, populate
from layerpack.runtime.stream.ring import ReadRing

_REGISTER_DEFAULT, _REGISTER_READ_ONLY = 0, 8
_MAP_BYTES, _MAP_THREADS = 64 * MIB, 4
_COPY_BYTES, _COPY_THREADS = 16 * MIB, 8


class PinnedBuffers:
    """Page-aligned host memory that the device copies from without staging (none: plain memory).

    Anonymous mappings registered with CUDA rather than torch's pinned allocator, which rounds
    sizes up to powers of two and does not promise page alignment for direct reads.
    """

    def __init__(self, *, count: int, each_bytes: int, device: torch.device) -> None:
        self._registered: list[int] = []
        self.tensors: list[torch.Tensor] = []
        try:
            for _ in range(count):
                tensor = _anonymous(each_bytes)
                if device.type == "cuda":
                    code = _register(tensor, _REGISTER_DEFAULT)
                    if code:
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
            _unregister(address)
        self._registered.clear()
        self.tensors.clear()


class _Populating:
    """A reader that fills no buffer: it brings the pages of mapped slices into memory."""

    direct = False

    def __init__(self, slices: Sequence[Slice], mapped: dict[int, torch.Tensor]) -> None:
        self._places = {
            (part.path, piece.offset_bytes): mapped[part.index][
                piece.offset_bytes - part.offset_bytes :
            ]
            for part in slices
            for piece in split(part, _MAP_BYTES)
        }

    def read(self, path: Path, offset_bytes: int, length_bytes: int, buffer: memoryview) -> None:
        """Populate the piece; blocks, with the GIL released. Raises StreamError."""
        populate(self._places[path, offset_bytes][:length_bytes], str(path))

    def close(self) -> None:
        """Nothing is open."""


def read_slice(
    part: Slice,
    whole: memoryview,
    reader: Reader,
    *,
    watchdog_s: float,
    cancelled: threading.Event,
) -> None:
    """Read the slice to the beginning of `whole`, by several threads; blocks. Raises StreamError.

    For direct reads `whole` must begin on a page and hold the slice's `slot_bytes`.
    """
    pieces = split(part, _COPY_BYTES)
    ring = ReadRing(
        # As many buffers as pieces: each is read to its place.
        buffers=[whole[piece.offset_bytes - part.offset_bytes :] for piece in pieces],
        reader=reader,
        piece_of=lambda ticket: pieces[ticket],
        num_threads=min(_COPY_THREADS, len(pieces)),
        num_tickets=len(pieces),
    )
    with ring:
        for _ in pieces:
            stop_if(cancelled)
            ring.take(timeout_s=watchdog_s)
            ring.release(None)


class HostStore:
    """Slices held in host memory for the device to copy from. A context manager.

    After `load`, `tensors[index]` is the slice's bytes. `copied_bytes` counts what had to be
    copied to pinned memory: its mapping could not be registered, or it is compressed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._registered: list[int] = []
        self._copies: list[PinnedBuffers] = []
        self.tensors: dict[int, torch.Tensor] = {}
        self.copied_bytes = 0

    def load(
        self,
        slices: Sequence[Slice],
        reader: Reader,
        *,
        may_register: bool = True,
        watchdog_s: float = 60.0,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Map and register each slice, or copy it; blocks, until `cancelled` at the latest.

        Compressed slices are decoded into pinned memory: there is no file to map.

        Raises StreamError, CapacityError.
        """
        cancelled = cancelled or threading.Event()
        if may_register:
            plain = [part for part in slices if part.frames is None]
            self._map_all(plain, watchdog_s, cancelled)
        for part in slices:
            if part.index not in self.tensors:
                self.tensors[part.index] = self._copy(part, reader, watchdog_s, cancelled)

    def _map_all(
        self, slices: Sequence[Slice], watchdog_s: float, cancelled: threading.Event
    ) -> None:
        """Map and register, up to the first slice for which that is refused."""
        mapped = {part.index: map_slice(part) for part in slices}
        pieces = [(part, piece) for part in slices for piece in split(part, _MAP_BYTES)]
        ring = ReadRing(
            buffers=[memoryview(b"")] * (2 * _MAP_THREADS),
            reader=_Populating(slices, mapped),
            piece_of=lambda ticket: pieces[ticket][1],
            num_threads=_MAP_THREADS,
            num_tickets=len(pieces),
        )
        with ring:
            for part, piece in pieces:
                stop_if(cancelled)
                ring.take(timeout_s=watchdog_s)
                ring.release(None)
                if piece.end_bytes == part.offset_bytes + part.length_bytes:
                    if not self._register(mapped[part.index]):
                        return  # refused once, refused always: do not ask 80 times
                    self.tensors[part.index] = mapped[part.index]

    def _register(self, tensor: torch.Tensor) -> bool:
        if _register(tensor, _REGISTER_READ_ONLY):
            return False
        self._registered.append(tensor.data_ptr())
        return True

    def _copy(
        self, part: Slice, reader: Reader, watchdog_s: float, cancelled: threading.Event
    ) -> torch.Tensor:
        pinned = PinnedBuffers(count=1, each_bytes=part.slot_bytes, device=self._device)
        self._copies.append(pinned)
        read_slice(part, pinned.views[0], reader, watchdog_s=watchdog_s, cancelled=cancelled)
        self.copied_bytes += part.length_bytes
        return pinned.tensors[0][: part.length_bytes]

    def __enter__(self) -> HostStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unregister everything; nothing may be copying any more."""
        for address in self._registered:
            _unregister(address)
        self._registered.clear()
        for pinned in self._copies:
            pinned.close()
        self._copies.clear()
        self.tensors.clear()


def _register(tensor: torch.Tensor, flags: int) -> int:
    """CUDA's error code, 0 when registered. Whole pages are registered.

    Raises torch.AcceleratorError if the device has failed.
    """
    code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), flags))
    if code:
        # The CUDA runtime keeps the error and hands it to the next launch: let that be this one.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        torch.cuda.synchronize()  # a device that failed refuses everything: that is no refusal
    return code


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


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
