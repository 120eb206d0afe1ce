"""Write a pack with a model's true shapes and random weights, straight through the pack's writer.

    python benchmarks/make_pack.py qwen2.5-72b /data/random-72b [--layers N]

A 72B pack needs no 145 GB source this way. Every layer holds random codes of its own, so that no
storage can keep two as one: what is timed is bytes and arithmetic, not meaning. The weights are
scaled so that activations stay finite. The tokenizer knows bytes.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from parts.pack_shape import BlobShape, blob_shapes, manifest_of
from parts.shapes import SHAPES

from layerpack.formats.blob import nf4
from layerpack.formats.blob.layout import layout_blob
from layerpack.formats.blob_writer import BlobWriter
from layerpack.formats.digest import bytes_digest
from layerpack.formats.manifest.document import dump_manifest
from layerpack.formats.manifest.facts import MANIFEST_NAME, Blob, FileEntry, Manifest
from layerpack.formats.units import human_bytes

_ABSMAX = 0.02 * 2.5
_PIECE = 1 << 26
_NUM_WRITERS = 4  # one waits for the disk while another makes bytes


class _Random:
    """The same random bytes again and again: fast, and incompressible within a tensor."""

    def __init__(self, seed: int) -> None:
        self._bytes = np.random.default_rng(seed).integers(0, 256, _PIECE, dtype=np.uint8)

    def write(self, writer: BlobWriter, name: str, length_bytes: int) -> None:
        for begin in range(0, length_bytes, _PIECE):
            writer.write(name, memoryview(self._bytes[: min(_PIECE, length_bytes - begin)].data))


def _bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2")


def _write(folder: Path, shape: BlobShape) -> Blob:
    path, layout = folder / shape.file, layout_blob(shape.specs)
    random = _Random(0 if shape.layer is None else shape.layer + 1)
    states = shape.states(_ABSMAX)
    # Left in the page cache: what is measured first is reading it from there.
    with BlobWriter(path, layout, direct=False) as writer:
        for entry in layout.tensors:
            name, count = entry.name, entry.length_bytes
            if name.endswith(nf4.STATE):
                state = states[name.removesuffix(nf4.STATE)]
                writer.write(name, nf4.encode_state(state, count))
            elif name.endswith(nf4.NESTED_QUANT_MAP):
                writer.write(name, np.linspace(-1, 1, 256, dtype="<f4").tobytes())
            elif name.endswith(nf4.QUANT_MAP):
                writer.write(name, np.array(nf4.NF4_CODES, dtype="<f4").tobytes())
            elif entry.dtype == "F32":
                writer.write(name, np.full(count // 4, _ABSMAX / 4, dtype="<f4").tobytes())
            elif entry.dtype == "U8":
                random.write(writer, name, count)
            elif len(entry.shape) == 2:
                generator = np.random.default_rng(1)
                values = _bf16(generator.standard_normal(_PIECE // 2, dtype=np.float32) * 0.02)
                raw = memoryview(values.data).cast("B")
                for begin in range(0, count, _PIECE):
                    writer.write(name, raw[: min(_PIECE, count - begin)])
            else:
                fill = 0.0 if name.endswith("bias") else 1.0
                writer.write(name, _bf16(np.full(count // 2, fill)).tobytes())
    assert writer.digest is not None
    return Blob(
        role=shape.role,
        layer=shape.layer,
        file=shape.file,
        file_bytes=layout.file_bytes,
        digest=writer.digest,
        tensors=layout.tensors,
        nf4=states,
    )


def make_pack(model: str, path: Path, *, num_layers: int | None = None) -> Manifest:
    """Write the pack, over one that is there; the manifest."""
    config = dict(SHAPES[model])
    config["num_hidden_layers"] = num_layers or config["num_hidden_layers"]
    path.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_NUM_WRITERS) as pool:
        blobs = list(pool.map(lambda shape: _write(path, shape), blob_shapes(config)))
    config |= {"dtype": "bfloat16", "quantization_config": _QUANTIZATION}
    (path / "config.json").write_text(json.dumps(config, indent=1))
    (path / "model.safetensors.index.json").write_text(json.dumps(_index(blobs), indent=1))
    _write_tokenizer(path)
    files = [
        FileEntry(
            name=file.name,
            file_bytes=file.stat().st_size,
            digest=bytes_digest(file.read_bytes()),
        )
        for file in sorted(path.glob("*.json"))
        if file.name != MANIFEST_NAME
    ]
    manifest = manifest_of(config, f"random {model}", blobs, files)
    (path / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
    os.sync()
    return manifest


_QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
}


def _index(blobs: list[Blob]) -> dict[str, Any]:
    weights = {entry.name: blob.file for blob in blobs for entry in blob.tensors}
    return {"metadata": {"total_size": sum(b.file_bytes for b in blobs)}, "weight_map": weights}


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<|end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    manifest = make_pack(arguments.model, arguments.path, num_layers=arguments.layers)
    print(f"{arguments.path}: {len(manifest.blobs)} blobs, {human_bytes(manifest.total_bytes)}")


if __name__ == "__main__":
    main()
