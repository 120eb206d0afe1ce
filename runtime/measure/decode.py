"""How fast this machine decompresses a pack, with as many threads as a pass has."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from layerpack.formats.errors import PackError, StreamError
from layerpack.formats.frames.coding import FrameDecoder
from layerpack.formats.frames.table import Frame
from layerpack.formats.read import BufferedReader
from layerpack.runtime.core.slices import Slice
from layerpack.runtime.machine.machine import DECODE_THREADS

_SECONDS, _FRAMES = 0.5, 64


def measure_decode(
    slices: Sequence[Slice], *, seconds: float = _SECONDS, num_threads: int = DECODE_THREADS
) -> float:
    """GB/s of raw bytes out of a sample of the pack's frames, in memory. Raises StreamError."""
    sample = _sample(slices)
    done_bytes = [0] * num_threads
    errors: list[PackError] = []
    begin_s = time.perf_counter()

    def work(thread: int) -> None:
        decoder = FrameDecoder()
        target = memoryview(bytearray(max(frame.raw_bytes for frame, _ in sample)))
        place = thread
        while time.perf_counter() - begin_s < seconds:
            frame, stored = sample[place % len(sample)]
            place += 1
            try:
                decoder.decode(stored, frame.coding, target[: frame.raw_bytes])
            except PackError as error:
                errors.append(error)
                return
            done_bytes[thread] += frame.raw_bytes

    threads = [
        threading.Thread(target=work, args=(i,), name=f"layerpack-measure-{i}", daemon=True)
        for i in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise StreamError(f"{slices[0].path.parent}: a frame {errors[0]}; run `layerpack verify`")
    return sum(done_bytes) / 1e9 / (time.perf_counter() - begin_s)


def _sample(slices: Sequence[Slice]) -> list[tuple[Frame, memoryview]]:
    """Frames spread evenly over the pass, so 16-bit and NF4 parts come in proportion."""
    frames = [
        (part, frame)
        for part in slices
        if part.frames is not None
        for frame in part.frames.covering(part.offset_bytes, part.length_bytes)
    ]
    reader = BufferedReader()
    sample = []
    for part, frame in frames[:: -(-len(frames) // _FRAMES)]:
        stored = memoryview(bytearray(frame.stored_bytes))
        reader.read(part.path, frame.offset_bytes, frame.stored_bytes, stored)
        sample.append((frame, stored))
    reader.close()
    return sample
