"""A pack of `--bits 16` is the checkpoint itself, streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from support.runs.rows import unequal_seeds

from layerpack.convert.api import convert
from layerpack.convert.options import ConvertOptions
from layerpack.formats.errors import UnsupportedError
from layerpack.formats.pack import Pack
from layerpack.runtime import Model, OpenOptions
from layerpack.runtime.plan.plan import Limits

PackOf = Callable[..., Path]
IDS = torch.tensor([[5, 17, 3, 88, 41, 2, 9, 60, 33, 71, 24, 8]])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("host", [None, 0], ids=["host", "disk"])
def test_logits_are_those_of_the_checkpoint(
    checkpoint_of: PackOf, pack_of: PackOf, name: str, host: int | None
) -> None:
    source, pack = checkpoint_of(name), pack_of(name, nf4=False)
    plain = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        for path in (source, pack)
    ]
    with torch.no_grad():
        wanted, as_checkpoint = (model(IDS).logits for model in plain)
    assert torch.equal(as_checkpoint, wanted)
    options = OpenOptions(device="cpu", limits=Limits(host_slices=host))
    with Model.open(pack, options) as model, torch.no_grad():
        for _ in range(2):
            assert torch.equal(model.network(IDS).logits, wanted)
        if model.rows is not None:
            assert unequal_seeds(model.rows, IDS[0].tolist(), range(4)) == []


def test_nothing_of_it_is_quantised(pack_of: PackOf) -> None:
    pack = Pack.open(pack_of("llama", nf4=False))
    assert pack.manifest.quantization is None
    assert not any(blob.nf4 for blob in pack.manifest.blobs)
    assert "quantization_config" not in pack.json_object("config.json")


def test_what_is_nf4_already_cannot_be_had_so(pack_of: PackOf, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"already NF4; 16 bits can be had"):
        convert(str(pack_of("llama")), tmp_path / "out", ConvertOptions(nf4=False))
