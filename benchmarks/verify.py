"""How close `layerpack verify` comes to the disk: its rate over that of reads alone, in one run.

    python benchmarks/verify.py /data/random-72b [--rounds 7] [--json result.json]

Both go past the page cache where the system can; where it cannot, the files are dropped from the
cache before each turn. First the best number of threads and size of reads is looked for, over
whole files, with nothing done to the bytes. Then reads in this way and `verify` take turns, the
one that begins changing each time, as disks drift: the ratio is of the medians of both.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerpack.formats.each_file import ReportBytes, for_each_file
from layerpack.formats.pack import Pack
from layerpack.formats.read import open_reader
from layerpack.formats.units import MIB
from layerpack.formats.verify import verify_pack
from layerpack.runtime.measure.page_cache import evict

_WAYS = [(threads, extent) for threads in (1, 4, 8, 16) for extent in (4 * MIB, 16 * MIB)]


def read_all(pack: Pack, *, num_threads: int, buffer_bytes: int) -> None:
    """Read every blob, and do nothing with it."""
    reader = open_reader(pack.blob_path(pack.manifest.blobs[0]))
    sizes = {pack.blob_path(blob): blob.file_bytes for blob in pack.manifest.blobs}

    def work(path: Path, report: ReportBytes) -> None:
        buffer = memoryview(mmap.mmap(-1, buffer_bytes))
        for begin in range(0, sizes[path], buffer_bytes):
            length = min(buffer_bytes, sizes[path] - begin)
            reader.read(path, begin, length, buffer)
            report(length)

    paths = sorted(sizes, key=lambda path: -sizes[path])
    for_each_file(paths, work, num_threads=num_threads, total_bytes=sum(sizes.values()))
    reader.close()


def rate(pack: Pack, work: Callable[[], Any]) -> float:
    """GB/s of one turn over the whole pack."""
    for blob in pack.manifest.blobs:
        evict(pack.blob_path(blob))
    begin_s = time.perf_counter()
    work()
    return pack.manifest.total_bytes / 1e9 / (time.perf_counter() - begin_s)


def run(path: Path, rounds: int) -> dict[str, Any]:
    """The JSON document."""
    pack = Pack.open(path)

    def read(way: tuple[int, int]) -> float:
        threads, buffer_bytes = way
        return rate(pack, lambda: read_all(pack, num_threads=threads, buffer_bytes=buffer_bytes))

    def verified() -> float:
        return rate(pack, lambda: verify_pack(path))

    assert not verify_pack(path).differences
    # Both ways through the list, so that none is always first after a rest.
    probes: dict[tuple[int, int], list[float]] = {way: [] for way in _WAYS}
    for way in (*_WAYS, *reversed(_WAYS)):
        probes[way].append(read(way))
    best = max(probes, key=lambda way: statistics.fmean(probes[way]))
    disk, verify = [], []
    for turn in range(rounds):
        if turn % 2:
            verify.append(verified())
            disk.append(read(best))
        else:
            disk.append(read(best))
            verify.append(verified())
    reader = open_reader(path / "layerpack.json")
    return {
        "pack_bytes": pack.manifest.total_bytes,
        "direct": reader.direct,
        "cpu_cores": os.cpu_count(),
        "rounds": rounds,
        "probes_gb_s": {_title(way): round(statistics.fmean(probes[way]), 3) for way in _WAYS},
        "best_way": _title(best),
        "disk_gb_s": [round(found, 3) for found in sorted(disk)],
        "verify_gb_s": [round(found, 3) for found in sorted(verify)],
        "verify_over_disk": round(statistics.median(verify) / statistics.median(disk), 3),
    }


def _title(way: tuple[int, int]) -> str:
    threads, buffer_bytes = way
    return f"{threads} threads, {buffer_bytes // MIB} MiB"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = run(arguments.pack, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
