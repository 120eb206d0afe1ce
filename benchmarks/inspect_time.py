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

from make_pack import layer_specs
from shapes import SHAPES

from layerpack.formats import nf4
from layerpack.formats.digest import Digest
from layerpack.formats.header import encode_header
from layerpack.formats.layout import Nf4Spec, PlainSpec, layout_blob
from layerpack.formats.manifest import (
    MANIFEST_NAME,
    Blob,
    Manifest,
    Model,
    Quantization,
    Role,
    Source,
)
from layerpack.formats.manifest_json import dump_manifest


def make_sparse_pack(model: str, path: Path) -> Manifest:
    """A pack valid as to manifest, sizes and headers; its data are holes, which take no room."""
    config = SHAPES[model]
    count = config["num_hidden_layers"]
    matrix = (config["vocab_size"], config["hidden_size"])
    embedding = PlainSpec(name="model.embed_tokens.weight", dtype="BF16", shape=matrix)
    head = PlainSpec(name="lm_head.weight", dtype="BF16", shape=matrix)
    norm = PlainSpec(name="model.norm.weight", dtype="BF16", shape=matrix[1:])
    blobs = [_write(path / "embed.safetensors", [embedding], Role.EMBEDDING, None)]
    for index in range(count):
        specs = layer_specs(config, f"model.layers.{index}.")
        blobs.append(_write(path / f"layer-{index:03d}.safetensors", specs, Role.LAYER, index))
    blobs.append(_write(path / "head.safetensors", [head, norm], Role.HEAD, None))
    manifest = Manifest(
        producer="layerpack benchmarks",
        source=Source(kind="directory", id=f"sparse {model}", revision=None, files=()),
        model=Model(
            architecture=config["architectures"][0],
            layers_path="model.layers",
            num_layers=count,
            dtype="BF16",
            embedding=embedding.name,
            head=head.name,
            num_parameters=sum(blob.num_parameters for blob in blobs),
        ),
        quantization=Quantization(block_size=64, double_quant=True, head=False),
        blobs=tuple(blobs),
    )
    (path / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
    return manifest


def _write(path: Path, specs: list[Nf4Spec | PlainSpec], role: Role, layer: int | None) -> Blob:
    layout = layout_blob(specs)
    with open(path, "wb") as file:
        file.write(encode_header(layout.tensors, data_start_bytes=layout.data_start_bytes))
        file.truncate(layout.file_bytes)
    states = {
        spec.name: nf4.Nf4State(
            shape=spec.shape, block_size=spec.block_size, dtype="BF16", nested_offset=0.1
        )
        for spec in specs
        if isinstance(spec, Nf4Spec)
    }
    return Blob(
        role=role,
        layer=layer,
        file=path.name,
        file_bytes=layout.file_bytes,
        digest=Digest().text,
        tensors=layout.tensors,
        nf4=states,
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
