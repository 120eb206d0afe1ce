"""FP8 weights, whatever their scales are stored in, against transformers' own dequantising."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.packs.comparing import differing
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from layerpack.convert import convert
from layerpack.formats.errors import UnsupportedError

BLOCK = (32, 64)


def fp8_and_plain(
    checkpoint: Path, scale_of: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[Path, Path]:
    """The checkpoint in FP8, and in the bfloat16 that transformers makes of that.

    `scale_of` gives the stored scales for wanted ones, float32.
    """
    fp8, plain = dict(load_file(checkpoint / "model.safetensors")), {}
    dequantise = Fp8Dequantize(None)._dequantize_one
    for name, tensor in list(fp8.items()):
        plain[name] = tensor
        if "_proj" in name:
            rows, columns = (side // step for side, step in zip(tensor.shape, BLOCK, strict=True))
            scale = scale_of(torch.rand(rows, columns) + 0.5)
            fp8[name], fp8[f"{name}_scale_inv"] = tensor.to(torch.float8_e4m3fn), scale
            plain[name] = dequantise(fp8[name], scale, torch.bfloat16)
    paths = []
    for kind, tensors in (("fp8", fp8), ("plain", plain)):
        path = checkpoint.with_name(kind)
        path.mkdir()
        config = json.loads((checkpoint / "config.json").read_text())
        if kind == "fp8":
            how = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
            config["quantization_config"] = how
        (path / "config.json").write_text(json.dumps(config))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        paths.append(path)
    return paths[0], paths[1]


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama", hidden_size=128, intermediate_size=256, max_shard_size="1GB")


@pytest.mark.parametrize(
    "scale_of",
    [
        torch.clone,
        torch.Tensor.bfloat16,
        lambda scale: scale.to(torch.float8_e8m0fnu),
        lambda scale: scale.to(torch.float8_e8m0fnu).view(torch.uint8),
    ],
    ids=["F32", "BF16", "F8_E8M0", "U8"],
)
def test_weights_are_those_of_transformers(
    checkpoint: Path, tmp_path: Path, scale_of: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    outs = []
    for source in fp8_and_plain(checkpoint, scale_of):
        outs.append(tmp_path / f"out-{source.name}")
        convert(str(source), outs[-1])
    assert differing(*outs) == ["layerpack.json"]


def test_scales_of_another_kind_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    source, _ = fp8_and_plain(checkpoint, torch.Tensor.int)
    with pytest.raises(UnsupportedError, match=r"weight_scale_inv is I32, which are no scales"):
        convert(str(source), tmp_path / "out")
