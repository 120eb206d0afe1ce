"""Time `layerpack inspect` on a pack with a model's true shapes, whose blobs are holes but headers.

    python benchmarks/inspect_time.py qwen2.5-72b [--runs 20]

Whole processes are timed, from `layerpack` to its end, everything in the page cache. Ends in JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from parts.pack_shape import BlobShape, blob_shapes, manifest_of
from parts.shapes import SHAPES

from layerpack.formats.blob.header import encode_header
from layerpack.formats.blob.layout import layout_blob
from layerpack.formats.digest import Digest
from layerpack.formats.manifest.document import dump_manifest
from layerpack.formats.manifest.facts import MANIFEST_NAME, Blob, Manifest


def make_sparse_pack(model: str, path: Path) -> Manifest:
    """A pack valid as to manifest, sizes and headers; its data are holes, which take no room."""
    config = SHAPES[model]
    blobs = [_write(path, shape) for shape in blob_shapes(config)]
    manifest = manifest_of(config, f"sparse {model}", blobs)
    (path / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
    return manifest


def _write(folder: Path, shape: BlobShape) -> Blob:
    layout = layout_blob(shape.specs)
    with open(folder / shape.file, "wb") as file:
        file.write(encode_header(layout.tensors, data_start_bytes=layout.data_start_bytes))
        file.truncate(layout.file_bytes)
    return Blob(
        role=shape.role,
        layer=shape.layer,
        file=shape.file,
        file_bytes=layout.file_bytes,
        digest=Digest().text,
        tensors=layout.tensors,
        nf4=shape.states(0.1),
    )


def _time_s(arguments: list[str]) -> float:
    start_s = time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start_s


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "layerpack.cli.main", "inspect"]
    result: dict[str, Any] = {"model": arguments.model, "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as directory:
        manifest = make_sparse_pack(arguments.model, Path(directory))
        result["blobs"] = len(manifest.blobs)
        result["tensors"] = sum(len(blob.tensors) for blob in manifest.blobs)
        result["manifest_bytes"] = (Path(directory) / MANIFEST_NAME).stat().st_size
        for name, options in (("plain", []), ("tensors", ["--tensors"]), ("json", ["--json"])):
            times_s = [_time_s([*command, directory, *options]) for _ in range(arguments.runs + 1)]
            print(f"inspect {' '.join(options):10} median {statistics.median(times_s[1:]):.3f} s")
            result[f"{name}_s"] = statistics.median(times_s[1:])
            result[f"{name}_worst_s"] = max(times_s[1:])
        subprocess.run([*command, directory], check=True)
    result["start_s"] = statistics.median(
        _time_s([sys.executable, "-c", "import layerpack.cli.main"]) for _ in range(5)
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
