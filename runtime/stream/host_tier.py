"""Slices in host memory that the device copies from: mapped files, registered with CUDA.

A registered mapping is the page cache itself, read by the GPU in place: nothing is copied or
allocated on the host. Where the system refuses to register a mapped file (some do), and where the
pack is compressed, the bytes are copied once into pinned memory instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch

from layerpack.formats.read import Reader
from layerpack.formats.units import MIB
from layerpack.libraries.torch_api import register_host, unregister_host
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Extent, Slice
from layerpack.runtime.core.threads import in_order
from layerpack.runtime.stream.mapped import map_slice, populate
from layerpack.runtime.stream.pinned import PinnedBuffers
from layerpack.runtime.stream.ring import ReadRing

_MAP_BYTES, _MAP_THREADS = 64 * MIB, 4
_COPY_BYTES, _COPY_THREADS = 16 * MIB, 8


def read_slice(part: Slice, whole: memoryview, reader: Reader, patience: Patience) -> None:
    """Read the slice to the beginning of `whole`, by several threads; waits.

    For direct reads `whole` must begin on a page and hold the slice's `slot_bytes`. Raises
    StreamError, CancelledError.
    """
    extents = part.extents(_COPY_BYTES)
    ring = ReadRing.over(
        extents,
        # As many buffers as extents: each is read to its place.
        buffers=[whole[extent.offset_bytes - part.offset_bytes :] for extent in extents],
        reader=reader,
        num_threads=min(_COPY_THREADS, len(extents)),
    )
    with ring:
        for _ in ring.take_all(patience):
            ring.release(None)


class HostTier:
    """Slices held in host memory for the device to copy from. A context manager.

    After `load`, `tensors[index]` is the slice's bytes. `copied_bytes` counts what had to be
    copied to pinned memory.
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
        patience: Patience,
    ) -> None:
        """Map and register each slice, or copy it; waits. Raises StreamError, CapacityError."""
        if may_register:
            self._map_all([part for part in slices if part.frames is None], patience)
        for part in slices:
            if part.index not in self.tensors:
                self.tensors[part.index] = self._copy(part, reader, patience)

    def _map_all(self, slices: Sequence[Slice], patience: Patience) -> None:
        """Map and register, up to the first slice for which that is refused."""
        mapped = {part.index: map_slice(part) for part in slices}

        def bring(item: tuple[Slice, Extent]) -> None:
            part, extent = item
            begin = extent.offset_bytes - part.offset_bytes
            populate(mapped[part.index][begin : begin + extent.length_bytes], str(part.path))

        extents = [(part, extent) for part in slices for extent in part.extents(_MAP_BYTES)]
        for part, extent in in_order(
            bring,
            extents,
            num_threads=_MAP_THREADS,
            patience=patience,
            stalled=lambda item: (
                f"no bytes of {item[0].title} from {item[0].path} for {patience.watchdog_s:.0f} s; "
                "the disk does not answer"
            ),
        ):
            if extent.end_bytes == part.offset_bytes + part.length_bytes:
                tensor = mapped[part.index]
                if register_host(tensor, read_only=True):
                    return  # refused once, refused always: do not ask 80 times
                self._registered.append(tensor.data_ptr())
                self.tensors[part.index] = tensor

    def _copy(self, part: Slice, reader: Reader, patience: Patience) -> torch.Tensor:
        pinned = PinnedBuffers(count=1, each_bytes=part.slot_bytes, device=self._device)
        self._copies.append(pinned)
        read_slice(part, pinned.views[0], reader, patience)
        self.copied_bytes += part.length_bytes
        return pinned.tensors[0][: part.length_bytes]

    def __enter__(self) -> HostTier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unregister everything; nothing may be copying any more."""
        for address in self._registered:
            unregister_host(address)
        self._registered.clear()
        for pinned in self._copies:
            pinned.close()
        self._copies.clear()
        self.tensors.clear()
