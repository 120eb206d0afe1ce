"""How fast this machine's links are, measured in about a second and remembered.

The file is one JSON object in the user's cache directory; a key names device and disk, so another
card or drive is measured anew. `refresh` measures again.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from layerpack.formats.errors import StreamError
from layerpack.formats.read import open_reader
from layerpack.formats.units import MIB
from layerpack.runtime.decode_speed import measure_decode
from layerpack.runtime.host import PinnedBuffers
from layerpack.runtime.machine import Machine, host_free_bytes, vram_free_bytes
from layerpack.runtime.slices import Slice
from layerpack.runtime.stream import split

_LINK_BYTES = 256 * MIB
_DISK_SECONDS, _DISK_THREADS, _PIECE_BYTES = 0.6, 8, 4 * MIB


def probe_machine(
    device: torch.device,
    slices: Sequence[Slice],
    *,
    vram_cap_bytes: int | None = None,
    refresh: bool = False,
) -> Machine:
    """Memory as it is now, bandwidths from the cache or measured. Raises StreamError."""
    path = slices[0].path
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    known = {} if refresh else _load()
    link_key, disk_key = f"link {name}", f"disk {os.stat(path).st_dev}"
    measured = dict(known)
    if on_gpu and link_key not in measured:
        measured[link_key] = measure_link(device)
    if disk_key not in measured:
        measured[disk_key] = measure_disk(slices)
    decode_gb_s = 0.0
    if (table := slices[0].frames) is not None:
        # Another pack may decode at another speed, and another container may have other cores.
        decode_key = f"decode {os.cpu_count()} cores {table.raw_digest}"
        if decode_key not in measured:
            measured[decode_key] = measure_decode(slices)
        decode_gb_s = measured[decode_key]
    if measured != known:
        _store(measured)
    return Machine(
        device=name,
        vram_free_bytes=vram_free_bytes(device, vram_cap_bytes) if on_gpu else None,
        host_free_bytes=host_free_bytes(),
        link_gb_s=measured.get(link_key, 0.0),
        disk_gb_s=measured[disk_key],
        decode_gb_s=decode_gb_s,
    )


def measure_link(device: torch.device) -> float:
    """GB/s from pinned host memory to `device`: median of five copies after one to warm up."""
    pinned = PinnedBuffers(count=1, each_bytes=_LINK_BYTES, device=device)
    try:
        target = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device)
        times_s = []
        for _ in range(6):
            torch.cuda.synchronize(device)
            begin_s = time.perf_counter()
            target.copy_(pinned.tensors[0], non_blocking=True)
            torch.cuda.synchronize(device)
            times_s.append(time.perf_counter() - begin_s)
        return _LINK_BYTES / 1e9 / statistics.median(times_s[1:])
    finally:
        pinned.close()


def measure_disk(
    slices: Sequence[Slice],
    *,
    seconds: float = _DISK_SECONDS,
    num_threads: int = _DISK_THREADS,
    piece_bytes: int = _PIECE_BYTES,
) -> float:
    """GB/s of direct reads of the pack's own files by some threads. Raises StreamError.

    Where direct reads are not possible the page cache takes part, and the figure is an upper one.
    """
    reader = open_reader(slices[0].path)
    pieces = iter([piece for part in slices for piece in split(part.stored, piece_bytes)])
    buffers = PinnedBuffers(count=num_threads, each_bytes=piece_bytes, device=torch.device("cpu"))
    done_bytes = [0] * num_threads
    errors: list[StreamError] = []
    lock = threading.Lock()
    begin_s = time.perf_counter()

    def work(thread: int) -> None:
        view = buffers.views[thread]
        while time.perf_counter() - begin_s < seconds:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            try:
                reader.read(piece.path, piece.offset_bytes, piece.length_bytes, view)
            except StreamError as error:
                errors.append(error)
                return
            done_bytes[thread] += piece.length_bytes

    threads = [
        threading.Thread(target=work, args=(i,), name=f"layerpack-measure-{i}", daemon=True)
        for i in range(num_threads)
    ]
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


def cache_file() -> Path:
    """Where measurements are kept: $XDG_CACHE_HOME/layerpack/machine.json."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "layerpack" / "machine.json"


def _load() -> dict[str, float]:
    try:
        data = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {
        key: float(value)
        for key, value in data.items()
        if isinstance(value, (int, float)) and value > 0
    }


def _store(measured: dict[str, float]) -> None:
    # A cache that cannot be written is measured again next time; never an error.
    with contextlib.suppress(OSError):
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as partial:
            json.dump(measured, partial, indent=1)
        os.replace(partial.name, file)
