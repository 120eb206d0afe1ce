"""Host memory that weights live in: mapped files, files registered with CUDA, pinned buffers.

A registered mapping is the page cache itself, read by the GPU in place: nothing is copied or
allocated on the host. Where the system refuses to register a mapped file (some do), the bytes are
copied once into pinned memory instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from layerpack.formats.errors import CapacityError, StreamError
from layerpack.formats.read import Reader
from layerpack.formats.units import MIB, human_bytes
from layerpack.runtime.slices import Slice

_REGISTER_DEFAULT, _REGISTER_READ_ONLY = 0, 8
_MADV_WILLNEED, _MADV_POPULATE_READ = 3, 22
_COPY_BYTES = 64 * MIB
_DECODE_THREADS = 8


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
        raise StreamError(
            f"{path}: cannot map {length_bytes} bytes from {offset_bytes} ({reason}); "
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
                tensor = torch.from_numpy(np.frombuffer(_anonymous(each_bytes), dtype=np.uint8))
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
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()
        self.tensors.clear()


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

    @property
    def copied_bytes(self) -> int:
        """Bytes in pinned memory of our own."""
        return sum(tensor.numel() for pinned in self._copies for tensor in pinned.tensors)

    def load(self, slices: Iterable[Slice], reader: Reader, *, may_register: bool = True) -> None:
        """Map and register each slice, or copy it; blocks. Raises StreamError, CapacityError.

        Compressed slices are decoded into pinned memory: there is no file to map.
        """
        slices = tuple(slices)
        plain = [part for part in slices if part.frames is None]
        framed = [part for part in slices if part.frames is not None]
        with ThreadPoolExecutor(4, thread_name_prefix="layerpack-map") as pool:
            for part, mapped in pool.map(self._populated, plain):
                # Refused once, refused always: do not ask 80 times.
                may_register = may_register and self._register(mapped)
                self.tensors[part.index] = mapped if may_register else self._copy(part, reader)
        with ThreadPoolExecutor(_DECODE_THREADS, thread_name_prefix="layerpack-decode") as pool:
            copies = pool.map(lambda part: self._copy(part, reader), framed)
            self.tensors |= {
                part.index: tensor for part, tensor in zip(framed, copies, strict=True)
            }

    @staticmethod
    def _populated(part: Slice) -> tuple[Slice, torch.Tensor]:
        tensor = map_slice(part)
        _madvise(tensor, _MADV_POPULATE_READ)
        return part, tensor

    def _register(self, tensor: torch.Tensor) -> bool:
        if _register(tensor, _REGISTER_READ_ONLY):
            return False
        self._registered.append(tensor.data_ptr())
        return True

    def _copy(self, part: Slice, reader: Reader) -> torch.Tensor:
        pinned = PinnedBuffers(count=1, each_bytes=part.slot_bytes, device=self._device)
        self._copies.append(pinned)
        view = pinned.views[0]
        for begin in range(0, part.length_bytes, _COPY_BYTES):
            length = min(_COPY_BYTES, part.length_bytes - begin)
            reader.read(part.path, part.offset_bytes + begin, length, view[begin:])
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
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()
        for pinned in self._copies:
            pinned.close()
        self._copies.clear()
        self.tensors.clear()


def _register(tensor: torch.Tensor, flags: int) -> int:
    """CUDA's error code, 0 when registered. Whole pages are registered."""
    code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), flags))
    if code:
        # The CUDA runtime keeps the error and hands it to the next launch: let that be this one.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
    return code


def _anonymous(length_bytes: int) -> mmap.mmap:
    if os.name == "posix":
        return mmap.mmap(-1, length_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, length_bytes)


def _madvise(tensor: torch.Tensor, advice: int) -> None:
    if os.name != "posix":
        return
    page = mmap.PAGESIZE
    first = tensor.data_ptr() // page * page
    length = tensor.data_ptr() + tensor.numel() - first
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(advice))
