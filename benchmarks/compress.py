"""What lossless compression gains on a pack, and what it costs to undo, frame by frame.

    python benchmarks/compress.py /data/pack [--levels 1 3 9] [--frames 64] [--json result.json]

For layers, embedding and head apart: stored over raw bytes at each level, seconds to compress, and
GB/s of raw bytes that one core decompresses. A sample of frames, spread over the blobs. What comes
out is compared with what went in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from layerpack.formats.frames.coding import FrameDecoder, encode_frame, zstd_library
from layerpack.formats.frames.table import FRAME_BYTES
from layerpack.formats.manifest.facts import Blob
from layerpack.formats.pack import Pack, raw_reader
from layerpack.formats.read import BufferedReader
from layerpack.formats.units import align_up


def sample(pack: Pack, blobs: tuple[Blob, ...], count: int) -> list[tuple[bytes, bool]]:
    """Frames of raw bytes, and whether most of each are 16-bit floats."""
    places = [
        (blob, begin)
        for blob in blobs
        for begin in range(blob.data_start_bytes, blob.raw_bytes, FRAME_BYTES)
    ]
    reader, frames = raw_reader(pack, BufferedReader()), []
    for blob, begin in places[:: -(-len(places) // count)]:
        raw = bytearray(min(FRAME_BYTES, blob.raw_bytes - begin))
        reader.read(pack.blob_path(blob), begin, len(raw), memoryview(raw))
        floats = sum(
            max(0, min(begin + len(raw), e.end_bytes) - max(begin, e.offset_bytes))
            for e in blob.tensors
            if e.dtype in ("BF16", "F16")
        )
        frames.append((bytes(raw), floats > len(raw) // 2))
    reader.close()
    return frames


def measure(frames: list[tuple[bytes, bool]], level: int) -> dict[str, float]:
    """Ratio as stored (whole pages), and one core's GB/s both ways."""
    begin_s = time.process_time()
    encoded = [encode_frame(raw, level=level, planes=planes) for raw, planes in frames]
    encode_s = time.process_time() - begin_s
    raw_bytes = sum(len(raw) for raw, _ in frames)
    decoder, target = FrameDecoder(), memoryview(bytearray(FRAME_BYTES))
    times_s = []
    for _ in range(5):
        begin_s = time.process_time()
        for (coding, stored), (raw, _) in zip(encoded, frames, strict=True):
            decoder.decode(memoryview(stored), coding, target[: len(raw)])
        times_s.append(time.process_time() - begin_s)
    for (coding, stored), (raw, _) in zip(encoded, frames, strict=True):
        decoder.decode(memoryview(stored), coding, target[: len(raw)])
        assert target[: len(raw)] == raw
    stored_bytes = sum(align_up(len(stored)) for _, stored in encoded)
    return {
        "stored_over_raw": round(stored_bytes / raw_bytes, 4),
        "encode_gb_s": round(raw_bytes / 1e9 / encode_s, 3),
        "decode_gb_s": round(raw_bytes / 1e9 / statistics.median(times_s), 3),
    }


def run(path: Path, levels: list[int], count: int) -> dict[str, Any]:
    """The JSON document."""
    pack = Pack.open(path)
    manifest = pack.manifest
    parts = {
        "layers": manifest.layers,
        "embedding": (manifest.embedding,),
        "head": (manifest.head,),
    }
    result: dict[str, Any] = {"pack": manifest.source.id, "zstd": zstd_library()}
    for name, blobs in parts.items():
        frames = sample(pack, blobs, count)
        result[name] = {
            "raw_bytes": sum(blob.raw_bytes for blob in blobs),
            **{f"level {level}": measure(frames, level) for level in levels},
        }
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = run(arguments.pack, arguments.levels, arguments.frames)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
