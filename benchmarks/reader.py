"""The reader alone against the disk's own limit, by fio, on one file in one run. Needs no GPU.

    apt-get install -y fio
    python benchmarks/reader.py [FOLDER] [--gb 4] [--rounds 5]

FOLDER (default: here) says which disk; a file of random bytes is made there and deleted after.
Direct: our ring of reader threads, its extents copied into slots, against fio with direct=1, the
same block size and the best of a few queue depths. Mapped: what a CPU run does with layers that it
has no memory for (ask for pages ahead, have them come, copy), against fio's mmap and buffered
engines, with a cold page cache and with a warm one. Runs alternate; medians, least and most. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from layerpack.formats.read import DirectReader, open_reader
from layerpack.formats.units import MIB
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Kind, Slice
from layerpack.runtime.plan.plan import BUFFER_BYTES, NUM_BUFFERS
from layerpack.runtime.stream.lane import HostLane
from layerpack.runtime.stream.mapped import advise_needed, map_slice, populate
from layerpack.runtime.stream.pinned import PinnedBuffers
from layerpack.runtime.stream.ring import ReadRing

LAYER_BYTES = 432 * MIB
COUNTS = (2, 4, 8, 16)


def make_file(path: Path, total_bytes: int) -> tuple[Slice, ...]:
    """A file of random bytes on the disk, seen as layers of 72B's size."""
    block = os.urandom(64 * MIB)
    with open(path, "wb", buffering=0) as file:
        for _ in range(total_bytes // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    size = path.stat().st_size
    return tuple(
        Slice(
            index=index,
            kind=Kind.LAYER,
            number=index,
            path=path,
            offset_bytes=offset,
            length_bytes=min(LAYER_BYTES, size - offset),
        )
        for index, offset in enumerate(range(0, size, LAYER_BYTES))
    )


def drop_cache(path: Path) -> None:
    """Take the file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def fio(
    path: Path, engine: str, *, depth: int = 1, direct: bool = False, cold: bool = True
) -> float:
    """GB/s by fio's own account of one sequential read of the file."""
    command = ["fio", "--name=limit", f"--filename={path}", "--rw=read", "--readonly"]
    command += [f"--bs={BUFFER_BYTES}", f"--ioengine={engine}", f"--iodepth={depth}"]
    command += [f"--direct={int(direct)}", f"--invalidate={int(cold)}", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"fio {engine}: {(done.stderr or done.stdout).strip()[:200]}")
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"]) / 1e9


def direct(slices: tuple[Slice, ...], buffers: PinnedBuffers, num_threads: int) -> float:
    """GB/s of the ring with direct reads, every extent copied to its place in a slot."""
    reader = DirectReader()
    extents = [(part, extent) for part in slices for extent in part.extents(BUFFER_BYTES)]
    lane = HostLane(num_slots=2, slot_bytes=LAYER_BYTES)
    for slot in lane.slots:
        slot.zero_()
    ring = ReadRing.over(
        [extent for _, extent in extents],
        buffers=buffers.views,
        reader=reader,
        num_threads=num_threads,
    )
    begin_s = time.perf_counter()
    with ring:
        for (part, _), (extent, view) in zip(extents, ring.take_all(Patience()), strict=True):
            offset = extent.offset_bytes - part.offset_bytes
            lane.copy(part.index % 2, offset, torch.frombuffer(view, dtype=torch.uint8))
            ring.release(lane.fence())
    elapsed_s = time.perf_counter() - begin_s
    reader.close()
    return sum(part.length_bytes for part in slices) / 1e9 / elapsed_s


def mapped(slices: tuple[Slice, ...], *, cold: bool) -> float:
    """GB/s of copying mapped layers into a slot, the next two asked for ahead."""
    if cold:
        drop_cache(slices[0].path)
    slot = torch.zeros(LAYER_BYTES, dtype=torch.uint8)
    begin_s = time.perf_counter()
    tensors = [map_slice(part) for part in slices]
    for number, tensor in enumerate(tensors):
        for ahead in tensors[number + 1 : number + 3]:
            advise_needed(ahead)
        populate(tensor, slices[number].title)
        slot[: tensor.numel()].copy_(tensor)
    return sum(part.length_bytes for part in slices) / 1e9 / (time.perf_counter() - begin_s)


def best(name: str, of: Callable[[int], float]) -> int:
    """The count (queue depth, threads) that reads fastest, by one run each."""
    found = {count: of(count) for count in COUNTS}
    print(f"{name}: " + ", ".join(f"{count}: {rate:.2f} GB/s" for count, rate in found.items()))
    return max(found, key=lambda count: found[count])


def fio_engine(path: Path) -> str:
    """io_uring where it works, else libaio."""
    try:
        fio(path, "io_uring", depth=4, direct=True)
    except RuntimeError as reason:
        print(f"no io_uring here ({reason}); libaio instead")
        return "libaio"
    return "io_uring"


def run(path: Path, slices: tuple[Slice, ...], rounds: int) -> dict[str, Any]:
    """All figures; the JSON document."""
    if not open_reader(path).direct:
        sys.exit(f"{path}: direct reads are not possible on this file system; name another FOLDER")
    engine = fio_engine(path)
    buffers = PinnedBuffers(count=NUM_BUFFERS, each_bytes=BUFFER_BYTES, device=torch.device("cpu"))
    for tensor in buffers.tensors:
        tensor.zero_()
    depth = best(f"fio {engine}, depth", lambda n: fio(path, engine, depth=n, direct=True))
    threads = best("ring, threads", lambda n: direct(slices, buffers, n))
    ways: dict[str, Callable[[], float]] = {
        f"fio {engine} direct, depth {depth}": lambda: fio(path, engine, depth=depth, direct=True),
        f"ring direct, {threads} threads": lambda: direct(slices, buffers, threads),
        "fio mmap, cold": lambda: fio(path, "mmap"),
        "mapped, cold": lambda: mapped(slices, cold=True),
        "fio buffered, cold": lambda: fio(path, "psync"),
        "fio mmap, warm": lambda: fio(path, "mmap", cold=False),
        "mapped, warm": lambda: mapped(slices, cold=False),
        "fio buffered, warm": lambda: fio(path, "psync", cold=False),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        # Back and forth: a rented disk may be faster after a rest, and each must have that once.
        for name in reversed(ways) if number % 2 else ways:
            rates[name].append(ways[name]())
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        print(f"{name:<31} {medians[name]:6.2f} GB/s   ({min(found):.2f} to {max(found):.2f})")
    fio_direct, ours_direct = list(ways)[:2]
    ratios = {
        "ring over fio, direct": _ratios(rates[ours_direct], rates[fio_direct]),
        "mapped over fio mmap, cold": _ratios(rates["mapped, cold"], rates["fio mmap, cold"]),
        "mapped over fio buffered, cold": _ratios(
            rates["mapped, cold"], rates["fio buffered, cold"]
        ),
        "mapped over fio mmap, warm": _ratios(rates["mapped, warm"], rates["fio mmap, warm"]),
    }
    for name, found in ratios.items():
        print(
            f"{name:<31} {statistics.median(found):6.1%}   ({min(found):.1%} to {max(found):.1%})"
        )
    return {
        "machine": {
            "cpu_cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "file_gb": path.stat().st_size / 1e9,
        "piece_mib": BUFFER_BYTES // MIB,
        "rounds": rounds,
        "gb_s": {
            name: {
                "median": round(medians[name], 3),
                "min": round(min(found), 3),
                "max": round(max(found), 3),
            }
            for name, found in rates.items()
        },
        "ratios": {name: round(statistics.median(found), 4) for name, found in ratios.items()},
    }


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Round by round: what a disk does slows both of a round."""
    return [our / their for our, their in zip(ours, theirs, strict=True)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path.cwd())
    parser.add_argument("--gb", type=int, default=4, help="size of the file")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if shutil.which("fio") is None:
        sys.exit("fio is not installed; get it with: apt-get update && apt-get install -y fio")
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="reader-") as folder:
        path = Path(folder) / "bytes"
        slices = make_file(path, arguments.gb * 10**9)
        result = run(path, slices, arguments.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
