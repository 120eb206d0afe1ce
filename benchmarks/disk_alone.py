"""How fast the disk gives a pack's bytes when nothing else is done with them.

    python benchmarks/disk_alone.py /data/random-72b [--seconds 1]

Short probes pick threads and extent size, each over a region of its own: what was read once may
come out of a cache next time. Then the bytes of one whole pass are read once that way. Ends in
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from layerpack.formats.errors import LayerpackError
from layerpack.formats.pack import Pack
from layerpack.formats.read import open_reader
from layerpack.formats.units import MIB
from layerpack.runtime.core.slices import Extent, Slice, pass_slices
from layerpack.runtime.stream.pinned import PinnedBuffers

WAYS = tuple((threads, piece_mib) for threads in (4, 8, 16) for piece_mib in (4, 16))
"""(threads, MiB a read) that are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How to read, and the GB/s of its probe."""

    num_threads: int
    buffer_bytes: int
    gb_s: float

    @property
    def title(self) -> str:
        """`8 threads, 16 MiB`."""
        return f"{self.num_threads} threads, {self.buffer_bytes // MIB} MiB"


def probe_ways(slices: Sequence[Slice], *, seconds: float) -> list[Way]:
    """Each of WAYS for `seconds` (or to the end of its region of the pass), best first."""
    found = []
    for number, (num_threads, piece_mib) in enumerate(WAYS):
        extents = _pieces(slices, piece_mib * MIB)
        first, last = (len(extents) * place // len(WAYS) for place in (number, number + 1))
        gb_s = _read(extents[first:last], num_threads, piece_mib * MIB, seconds)
        found.append(Way(num_threads=num_threads, buffer_bytes=piece_mib * MIB, gb_s=gb_s))
    return sorted(found, key=lambda way: -way.gb_s)


def read_pass(slices: Sequence[Slice], way: Way) -> float:
    """GB/s of reading all bytes of a pass once. Raises LayerpackError."""
    extents = _pieces(slices, way.buffer_bytes)
    return _read(extents, way.num_threads, way.buffer_bytes, math.inf)


def _pieces(slices: Sequence[Slice], buffer_bytes: int) -> list[Extent]:
    return [extent for part in slices for extent in part.extents(buffer_bytes)]


def _read(extents: Sequence[Extent], num_threads: int, buffer_bytes: int, seconds: float) -> float:
    """GB/s of the extents that were read; direct reads where the system can."""
    if not extents:
        return 0.0
    reader = open_reader(extents[0].path)
    buffers = PinnedBuffers(count=num_threads, each_bytes=buffer_bytes, device=torch.device("cpu"))
    todo = iter(extents)
    lock = threading.Lock()
    done_bytes = [0] * num_threads
    errors: list[LayerpackError] = []
    begin_s = time.perf_counter()

    def work(number: int) -> None:
        view = buffers.views[number]
        while time.perf_counter() - begin_s < seconds and not errors:
            with lock:
                extent = next(todo, None)
            if extent is None:
                return
            try:
                reader.read(extent.path, extent.offset_bytes, extent.length_bytes, view)
            except LayerpackError as error:
                errors.append(error)
            else:
                done_bytes[number] += extent.length_bytes

    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed_s = time.perf_counter() - begin_s
    reader.close()
    buffers.close()
    if errors:
        raise errors[0]
    return sum(done_bytes) / 1e9 / elapsed_s


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each probe")
    arguments = parser.parse_args()
    slices = pass_slices(Pack.open(arguments.pack))
    ways = probe_ways(slices, seconds=arguments.seconds)
    for way in ways:
        print(f"{way.title}: {way.gb_s:.3f} GB/s")
    gb_s = read_pass(slices, ways[0])
    total = sum(part.length_bytes for part in slices)
    print(f"whole pass, {ways[0].title}: {gb_s:.3f} GB/s")
    print(
        json.dumps(
            {
                "benchmark": "disk_alone",
                "direct": open_reader(slices[0].path).direct,
                "pass_bytes": total,
                "pass_gb_s": gb_s,
                "probes": [asdict(way) for way in ways],
            }
        )
    )


if __name__ == "__main__":
    main()
