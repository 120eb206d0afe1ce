"""FP8 weights, whatever their scales are stored in, against transformers' own dequantising."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from support.packs.comparing import differing
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from layerpack.convert import convert
from layerpack.formats.errors import SourceError, UnsupportedError

BLOCK = (32, 64)


def fp8_and_plain(
    checkpoint: Path, scale_of: Callable[[torch.Tensor], torch.Tensor], *, one: bool = False
) -> tuple[Path, Path]:
    """The checkpoint in FP8, and in the bfloat16 that transformers makes of that.

    `scale_of` gives the stored scales for wanted ones, float32. `one`: a single scale for a weight,
    and one for what goes into it, as Ministral 3 and Devstral 2 have them.
    """
    fp8, plain = dict(load_file(checkpoint / "model.safetensors")), {}
    dequantise = Fp8Dequantize(None)._dequantize_one
    for name, tensor in list(fp8.items()):
        plain[name] = tensor
        if "_proj" in name:
            rows, columns = (side // step for side, step in zip(tensor.shape, BLOCK, strict=True))
            scale = scale_of(torch.rand(()) if one else torch.rand(rows, columns) + 0.5)
            fp8[name], fp8[f"{name}_scale_inv"] = tensor.to(torch.float8_e4m3fn), scale
            plain[name] = dequantise(fp8[name], scale, torch.bfloat16)
            if one:
                fp8[name.replace("weight", "activation_scale")] = torch.tensor(0.3)
    paths = []
    for kind, tensors in (("fp8", fp8), ("plain", plain)):
        path = checkpoint.with_name(kind)
        path.mkdir()
        config = json.loads((checkpoint / "config.json").read_text())
        if kind == "fp8":
            how = {"quant_method": "fp8", "weight_block_size": None if one else list(BLOCK)}
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


@pytest.mark.parametrize("scale_of", [torch.clone, torch.Tensor.bfloat16], ids=["F32", "BF16"])
def test_one_scale_for_a_weight(
    checkpoint: Path, tmp_path: Path, scale_of: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    outs = []
    for source in fp8_and_plain(checkpoint, scale_of, one=True):
        outs.append(tmp_path / f"out-{source.name}")
        convert(str(source), outs[-1])
    assert differing(*outs) == ["layerpack.json"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["BF16", "F32"])
@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_weights_are_those_of_compressed_tensors(
    checkpoint: Path, tmp_path: Path, strategy: str, dtype: torch.dtype
) -> None:
    """transformers loads the checkpoint by that library; what it loads is saved and converted."""
    if dtype is torch.float32 and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("older versions of transformers round scales to the model's type on loading")
    tensors = load_file(checkpoint / "model.safetensors")
    for name, weight in list(tensors.items()):
        if "_proj" in name:
            count = {"channel": (weight.shape[0], 1), "tensor": (1,), "block": (4, 2)}[strategy]
            if strategy == "block":
                count = tuple(side // step for side, step in zip(weight.shape, BLOCK, strict=True))
            tensors[name] = weight.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = (torch.rand(count) + 0.5).to(dtype)
    config = json.loads((checkpoint / "config.json").read_text())
    kind = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**kind, "dynamic": False, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = list(BLOCK)
    inputs = {**kind, "dynamic": True, "strategy": "token"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
    }
    source = tmp_path / "fp8"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    state = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()}
    names = load_file(checkpoint / "model.safetensors").keys()
    whole = {name: state[name].contiguous() for name in names}
    save_file(whole, plain / "model.safetensors", metadata={"format": "pt"})
    convert(str(source), tmp_path / "out")
    convert(str(plain), tmp_path / "out-plain")
    assert differing(tmp_path / "out", tmp_path / "out-plain") == ["layerpack.json"]


def test_scales_that_fit_no_blocks_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    source, _ = fp8_and_plain(checkpoint, torch.clone)
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("scale_inv"))
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(SourceError, match=r"weight_scale_inv has the shape .* fits no blocks of"):
        convert(str(source), tmp_path / "out")


def test_scales_of_another_kind_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    source, _ = fp8_and_plain(checkpoint, torch.Tensor.int)
    with pytest.raises(UnsupportedError, match=r"weight_scale_inv is I32, which are no scales"):
        convert(str(source), tmp_path / "out")
