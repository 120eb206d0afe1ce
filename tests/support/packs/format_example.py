"""The blob that docs/format.md shows in hex, made by our own writer and quantiser."""

from __future__ import annotations

from pathlib import Path

import torch

from layerpack.convert.nf4.quantize import quantize_nf4
from layerpack.formats.blob import nf4
from layerpack.formats.blob.layout import BlobLayout, Nf4Spec, PlainSpec, layout_blob
from layerpack.formats.blob_writer import BlobWriter

WEIGHT, NORM = "model.layers.0.mlp.up_proj.weight", "model.layers.0.norm.weight"


def example_weight() -> torch.Tensor:
    """Two rows of 64: (i - 32) / 32, and 1/4 with -1/8 by turns. Exact in bfloat16."""
    ramp = (torch.arange(64, dtype=torch.float32) - 32) / 32
    turns = torch.tensor([0.25, -0.125] * 32)
    return torch.stack([ramp, turns]).bfloat16()


def write_example(path: Path) -> tuple[BlobLayout, nf4.Nf4State]:
    """Write the blob; where its tensors lie and the weight's state."""
    layout = layout_blob(
        [
            Nf4Spec(name=WEIGHT, shape=(2, 64), block_size=64, double_quant=True),
            PlainSpec(name=NORM, dtype="BF16", shape=(2,)),
        ]
    )
    weight = quantize_nf4(example_weight(), name=WEIGHT, device=torch.device("cpu"))
    with BlobWriter(path, layout) as writer:
        for entry in layout.tensors:
            if entry.name == NORM:
                writer.write(NORM, bytes.fromhex("803f0040"))  # 1 and 2
            elif entry.name.endswith(nf4.STATE):
                writer.write(entry.name, nf4.encode_state(weight.state, entry.length_bytes))
            else:
                writer.write(entry.name, weight.part(entry.name.removeprefix(WEIGHT)))
    return layout, weight.state
