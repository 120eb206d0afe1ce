"""Write a checkpoint with a model's true shapes and random bf16 weights, as the Hub has them.

    PYTHONPATH=benchmarks python benchmarks/parts/make_checkpoint.py llama-3.1-8b /data/r --layers 6

Shards of at most 3.9 GB and an index, names and order as transformers has them. The same 64 MiB of
normal values are written again and again, so that making it takes no longer than writing it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from parts.shapes import SHAPES

from layerpack.formats.blob.header import TensorEntry, encode_header, header_bytes
from layerpack.formats.units import human_bytes

SHARD_BYTES = 3_900_000_000
_PIECE = 1 << 26


def make_checkpoint(model: str, path: Path, *, num_layers: int) -> int:
    """Write it, config included; its weights' bytes."""
    config = {**SHAPES[model], "num_hidden_layers": num_layers, "torch_dtype": "bfloat16"}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    shards = list(_shards(_parameters(path)))
    values = torch.empty(_PIECE // 2, dtype=torch.bfloat16)
    values.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    random = memoryview(values.view(torch.uint8).numpy().data)
    weight_map, total_bytes = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(path / file, "wb", buffering=0) as out:
            start = header_bytes(shard)
            out.write(encode_header(_placed(shard, start), data_start_bytes=start))
            for entry in shard:
                weight_map[entry.name] = file
                total_bytes += entry.length_bytes
                for begin in range(0, entry.length_bytes, _PIECE):
                    out.write(random[: min(_PIECE, entry.length_bytes - begin)])
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return total_bytes


def _parameters(path: Path) -> Iterator[TensorEntry]:
    """Every weight, in the order of the module tree; offsets are not known yet."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    for name, tensor in model.state_dict().items():
        yield TensorEntry(
            name=name,
            dtype="BF16",
            shape=tuple(tensor.shape),
            offset_bytes=0,
            length_bytes=2 * tensor.numel(),
        )


def _shards(entries: Iterator[TensorEntry]) -> Iterator[list[TensorEntry]]:
    shard: list[TensorEntry] = []
    for entry in entries:
        if shard and sum(e.length_bytes for e in shard) + entry.length_bytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _placed(shard: list[TensorEntry], position: int) -> Iterator[TensorEntry]:
    for entry in shard:
        yield TensorEntry(
            name=entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            offset_bytes=position,
            length_bytes=entry.length_bytes,
        )
        position += entry.length_bytes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    arguments = parser.parse_args()
    total_bytes = make_checkpoint(arguments.model, arguments.path, num_layers=arguments.layers)
    print(f"{arguments.path}: {human_bytes(total_bytes)} of weights")


if __name__ == "__main__":
    main()
