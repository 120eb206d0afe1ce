"""How fast this machine's links are, measured in about a second and remembered.

The link is measured once per device, the disk once per pack: two packs on one file system may lie
on different parts of a drive, or on different drives. So is decompressing, where a pack is
compressed. `refresh` measures again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence

import torch

from layerpack.formats.errors import CapacityError
from layerpack.formats.read import Reader, open_reader
from layerpack.formats.units import MIB, align_up, human_bytes
from layerpack.runtime.core.device_errors import device_errors
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Extent, Slice
from layerpack.runtime.machine.devices import vram_free_bytes
from layerpack.runtime.machine.host_memory import host_memory
from layerpack.runtime.machine.machine import Machine
from layerpack.runtime.measure.decode import measure_decode
from layerpack.runtime.measure.remembered import Disk, load_links, store_links
from layerpack.runtime.plan.plan import BUFFER_BYTES, NUM_BUFFERS
from layerpack.runtime.stream.pinned import PinnedBuffers
from layerpack.runtime.stream.ring import ReadRing

_LINK_BYTES, _LINK_COPIES = 256 * MIB, 10
_DISK_SECONDS, _DISK_THREADS = 0.3, (4, 8, 16)
_ENOUGH_BYTES = 256 * MIB  # less says nothing about a disk, and is quickly read again


@device_errors("while it was measured")
def probe_machine(
    device: torch.device,
    slices: Sequence[Slice],
    *,
    patience: Patience,
    vram_cap_bytes: int | None = None,
    refresh: bool = False,
) -> Machine:
    """Memory as it is now, bandwidths from the cache or measured. Raises StreamError.

    Raises CapacityError if the device has no room to measure the link.
    """
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    known = load_links()
    link_gb_s = 0.0
    if on_gpu:
        link_gb_s = 0.0 if refresh else known.links.get(name, 0.0)
        if not link_gb_s:
            link_gb_s = known.links[name] = measure_link(device)
            store_links(known)
    folder = os.stat(slices[0].path.parent)
    key = f"{folder.st_dev}:{folder.st_ino}"
    disk = None if refresh else known.disks.get(key)
    if disk is None:
        disk, read_bytes = pick_threads(slices, patience)
        if read_bytes >= _ENOUGH_BYTES:
            known.disks[key] = disk
            store_links(known)
    host_free, host_total = host_memory()
    return Machine(
        device=name,
        vram_free_bytes=vram_free_bytes(device, vram_cap_bytes) if on_gpu else None,
        host_free_bytes=host_free,
        host_total_bytes=host_total,
        link_gb_s=link_gb_s,
        disk_gb_s=disk.gb_s,
        disk_threads=disk.num_threads,
        decode_gb_s=probe_decoding(slices, refresh=refresh),
    )


def probe_decoding(slices: Sequence[Slice], *, refresh: bool = False) -> float:
    """GB/s that come out of the pack's frames, from the cache or measured; 0 for a plain pack.

    Raises StreamError.
    """
    if (table := slices[0].frames) is None:
        return 0.0
    # Another pack may decode at another speed, and another container may have other cores.
    key = f"{os.cpu_count()} cores {table.raw_digest}"
    known = load_links()
    if refresh or key not in known.decoders:
        known.decoders[key] = measure_decode(slices)
        store_links(known)
    return known.decoders[key]


@device_errors("while its link was measured")
def measure_link(device: torch.device) -> float:
    """GB/s from pinned host memory to `device`: the best of some copies.

    What else uses the link, or the memory, can only take from it. Raises CapacityError,
    StreamError.
    """
    pinned = PinnedBuffers(count=1, each_bytes=_LINK_BYTES, device=device)
    try:
        target = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device)
        times_s = []
        for _ in range(_LINK_COPIES):
            torch.cuda.synchronize(device)
            begin_s = time.perf_counter()
            target.copy_(pinned.tensors[0], non_blocking=True)
            torch.cuda.synchronize(device)
            times_s.append(time.perf_counter() - begin_s)
        return _LINK_BYTES / 1e9 / min(times_s)
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"measuring the link takes {human_bytes(_LINK_BYTES)} of VRAM, and so much is not "
            "free; raise --vram or end what else uses the device"
        ) from error
    finally:
        pinned.close()


def pick_threads(slices: Sequence[Slice], patience: Patience) -> tuple[Disk, int]:
    """The best of a few numbers of reader threads, and the bytes read to find it.

    Each number reads a part of the pack of its own: what was read once may be in a cache that
    direct reads do not pass by (of a host, a controller, a server). Raises StreamError.
    """
    extents = _somewhere(slices, BUFFER_BYTES)
    found, read_bytes = [], 0
    with _opened(extents) as (reader, buffers):
        for number, num_threads in enumerate(_DISK_THREADS):
            first = number * len(extents) // len(_DISK_THREADS)
            last = (number + 1) * len(extents) // len(_DISK_THREADS)
            if first < last:
                done_bytes, elapsed_s = _time_reads(
                    extents[first:last], reader, buffers, _DISK_SECONDS, num_threads, patience
                )
                found.append(Disk(gb_s=done_bytes / 1e9 / elapsed_s, num_threads=num_threads))
                read_bytes += done_bytes
    return max(found, key=lambda disk: disk.gb_s), read_bytes


def measure_disk(
    slices: Sequence[Slice],
    *,
    patience: Patience,
    seconds: float = _DISK_SECONDS,
    num_threads: int = _DISK_THREADS[0],
    buffer_bytes: int = BUFFER_BYTES,
) -> float:
    """GB/s of direct reads of the pack's own files, from a random place on. Raises StreamError.

    Where direct reads are not possible the page cache takes part, and the figure is an upper one.
    """
    extents = _somewhere(slices, buffer_bytes)
    with _opened(extents) as (reader, buffers):
        done_bytes, elapsed_s = _time_reads(
            extents, reader, buffers, seconds, num_threads, patience
        )
    return done_bytes / 1e9 / elapsed_s


def _somewhere(slices: Sequence[Slice], buffer_bytes: int) -> list[Extent]:
    """All extents in file order, beginning anywhere: the next measurement reads others."""
    extents = [extent for part in slices for extent in part.stored.extents(buffer_bytes)]
    start = secrets.randbelow(len(extents))
    return extents[start:] + extents[:start]


@contextlib.contextmanager
def _opened(extents: Sequence[Extent]) -> Iterator[tuple[Reader, PinnedBuffers]]:
    """A reader, and buffers as a pass has them."""
    buffers = PinnedBuffers(
        count=min(NUM_BUFFERS, len(extents)),
        each_bytes=align_up(max(extent.length_bytes for extent in extents)),
        device=torch.device("cpu"),
    )
    for tensor in buffers.tensors:
        tensor.zero_()  # pages that are touched first by a read would be timed as the disk's
    with contextlib.closing(buffers), contextlib.closing(open_reader(extents[0].path)) as reader:
        yield reader, buffers


def _time_reads(
    extents: Sequence[Extent],
    reader: Reader,
    buffers: PinnedBuffers,
    seconds: float,
    num_threads: int,
    patience: Patience,
) -> tuple[int, float]:
    """(bytes, seconds) of reading through the ring that a pass uses, each once at most."""
    ends: list[tuple[float, int]] = []
    ring = ReadRing.over(
        extents,
        buffers=buffers.views,
        reader=reader,
        num_threads=num_threads,
        on_read=lambda extent, _, end_s: ends.append((end_s, extent.length_bytes)),
    )
    begin_s = time.perf_counter()
    with ring:
        for _ in ring.take_all(patience):
            ring.release(None)
            if time.perf_counter() - begin_s > seconds:
                break
    # What was still being read at the deadline has been read to its end by now.
    return sum(count for _, count in ends), max(end_s for end_s, _ in ends) - begin_s
