"""A conversion with a calibration over one without, by turns in one run.

    python benchmarks/quality/convert_calibrated.py SOURCE --calibration DIR --work-dir /data

Without --calibration one of random numbers is taken: the arithmetic is the same. On a GPU the bytes
are compared with those of the CPU once, unless --only-times. The source, a directory, is in the
page cache. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from layerpack.convert.api import convert
from layerpack.convert.options import ConvertOptions
from layerpack.formats.calibration.inputs import Inputs, layer_bytes, layer_name
from layerpack.formats.calibration.record import RECORD_NAME, Record, record_bytes
from layerpack.formats.digest import bytes_digest
from layerpack.formats.manifest.facts import Manifest
from layerpack.runtime.quality.input_sums import DAMPING, GROUP_COLUMNS


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-times", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work_dir, prefix="calibrated-") as scratch:
        root = Path(scratch)
        source = options.source
        for file in source.iterdir():
            file.read_bytes()
        plain = ConvertOptions(device=options.device)
        manifest = convert(str(source), root / "plain", plain)
        path = options.calibration or random_calibration(manifest, root / "calibration")
        calibrated = replace(plain, calibration=path)
        convert(str(source), root / "calibrated", calibrated)  # compiles
        same = None
        if options.device != "cpu" and not options.only_times:
            convert(str(source), root / "on-cpu", replace(calibrated, device="cpu"))
            same = contents(root / "on-cpu") == contents(root / "calibrated")
            shutil.rmtree(root / "on-cpu")
        seconds: dict[str, list[float]] = {"plain": [], "calibrated": []}
        for _ in range(options.rounds):
            for name, how in (("plain", plain), ("calibrated", calibrated)):
                shutil.rmtree(root / name)
                begin_s = time.perf_counter()
                convert(str(source), root / name, how)
                seconds[name].append(time.perf_counter() - begin_s)
                print(name, round(seconds[name][-1], 2), flush=True)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    result = {
        "source": str(source),
        "device": options.device,
        "machine": platform.machine(),
        "seconds": {name: [round(s, 2) for s in found] for name, found in seconds.items()},
        "over plain": round(medians["calibrated"] / medians["plain"], 3),
        "same bytes as on a CPU": same,
    }
    print(json.dumps(result))


def random_calibration(manifest: Manifest, path: Path) -> Path:
    """One for all weights of a pack."""
    path.mkdir()
    draw, digests = np.random.default_rng(0), []
    for layer, blob in enumerate(blob for blob in manifest.blobs if blob.layer is not None):
        columns = {name.removesuffix(".weight"): s.shape[1] for name, s in blob.nf4.items()}
        known = {count: random_inputs(count, draw) for count in set(columns.values())}
        inputs = {name: known[count] for name, count in columns.items()}
        data = layer_bytes(inputs, {f"{name}.weight": name for name in inputs})
        (path / layer_name(layer)).write_bytes(data)
        digests.append(bytes_digest(data))
    record = Record(
        producer="benchmark",
        architecture=manifest.model.architecture,
        num_layers=len(digests),
        source="",
        text=bytes_digest(b""),
        num_tokens=1,
        group_columns=GROUP_COLUMNS,
        damping=DAMPING,
    )
    (path / RECORD_NAME).write_bytes(record_bytes(record, digests))
    return path


def random_inputs(num_columns: int, draw: np.random.Generator) -> Inputs:
    """Shares of errors that neither vanish nor add up to more than the errors."""
    group = min(num_columns, GROUP_COLUMNS)
    shares = draw.standard_normal((num_columns, group), np.float32) / group
    shares[np.arange(group) <= np.arange(num_columns)[:, None] % group] = 0
    return Inputs(
        importance=draw.random(num_columns, np.float32) + np.float32(0.1),
        order=draw.permutation(num_columns).astype(np.int32),
        feedback=shares.astype(np.float16),
    )


def contents(path: Path) -> dict[str, str]:
    """Digests of all files."""
    return {file.name: bytes_digest(file.read_bytes()) for file in sorted(path.iterdir())}


if __name__ == "__main__":
    main()
