"""A model's GGUF file, as llama.cpp's converter writes it, becomes the pack of its directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models.every import save_random, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from layerpack.convert.api import convert
from layerpack.convert.gguf.rope import rope_parameters
from layerpack.convert.gguf.stated import Stated
from layerpack.formats.errors import SourceError, UnsupportedError

llama_cpp = pytest.importorskip("support.models.llama_cpp")

THETA = {"rope_theta": 20_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA}
LINEAR = {"rope_type": "linear", "factor": 4.0, **THETA}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 64,
    "long_factor": [1.0 + i / 3 for i in range(8)],
    "short_factor": [1.0 + i / 7 for i in range(8)],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"layer_norm_epsilon": 1e-4}),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0}),
    "gemma2-27b": (
        "gemma2",
        {"num_hidden_layers": 46, "head_dim": 32, "query_pre_attn_scalar": 16},
    ),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7}),
    "gemma3-linear": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", **THETA}}),
    "llama-heads": ("llama", {"head_dim": 32, "rms_norm_eps": 1e-3}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3, "head_dim": 64}),
    "llama-3.2": ("llama", {"rope_parameters": {**LLAMA3, "factor": 32.0}, "head_dim": 128}),
    "llama-3-few": (
        "llama",
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}, "head_dim": 16},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "nemotron": ("nemotron", {"norm_eps": 1e-4}),
    "nemotron-whole": (
        "nemotron",
        {"rope_parameters": {**THETA, "rope_type": "default", "partial_rotary_factor": 1.0}},
    ),
    "phi3": ("phi3", {"sliding_window": 24, "original_max_position_embeddings": 256}),
    "phi3-long": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "phi3-partial": (
        "phi3",
        {
            "rope_parameters": {**THETA, "rope_type": "default", "partial_rotary_factor": 0.5},
            "original_max_position_embeddings": 256,
        },
    ),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", **THETA}}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
    "stablelm": ("stablelm", {"layer_norm_eps": 1e-4, "use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {"norm_epsilon": 1e-4, "tie_word_embeddings": True}),
}
TIED = ("bloom", "gemma2", "gemma3_text")
NAMED_AFTERWARDS = {"mistral": "llama"}  # in a GGUF file they are one architecture


def make(path: Path, model_type: str, fields: dict[str, Any]) -> Path:
    usual: dict[str, Any] = {"tie_word_embeddings": model_type in TIED}
    if model_type.startswith("gemma"):
        usual["query_pre_attn_scalar"] = 16  # the length of a head, of all but the largest ones
    source = save_random(path, tiny_config(model_type, **{**usual, **fields}))
    for file in source.glob("generation_config.json"):
        file.unlink()
    return source


def logits(pack: Path, num_tokens: int) -> torch.Tensor:
    """Of a model of the pack's config, with random weights that are the same each time."""
    config = AutoConfig.from_pretrained(pack)
    del config.quantization_config
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (1, num_tokens), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "F32") for name in MODELS] + [(name, "BF16") for name in MODELS if "-" not in name],
)
def test_its_pack_is_that_of_the_directory(tmp_path: Path, name: str, kind: str) -> None:
    model_type, fields = MODELS[name]
    source = make(tmp_path / "source", model_type, fields)
    path = llama_cpp.write_like_llama_cpp(tmp_path / "m.gguf", source, kind=kind)
    packs = [tmp_path / "directory", tmp_path / "gguf"]
    manifest = convert(str(source), packs[0])
    convert(str(path), packs[1])
    for blob in manifest.blobs:
        assert (packs[0] / blob.file).read_bytes() == (packs[1] / blob.file).read_bytes(), blob.file
    for num_tokens in (40, 100):
        assert torch.equal(logits(packs[0], num_tokens), logits(packs[1], num_tokens))
    configs = [json.loads((pack / "config.json").read_text()) for pack in packs]
    assert configs[1]["model_type"] == NAMED_AFTERWARDS.get(model_type, model_type)


def test_a_split_file_is_one_model_whichever_part_is_named(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "llama", {})
    whole = llama_cpp.write_like_llama_cpp(tmp_path / "whole.gguf", source)
    (tmp_path / "split").mkdir()
    first = llama_cpp.write_like_llama_cpp(tmp_path / "split" / "s.gguf", source, parts=3)
    manifest = convert(str(whole), tmp_path / "wanted")
    parts = sorted(first.parent.iterdir())
    for named in (*parts, first.parent):
        out = tmp_path / "out"
        found = convert(str(named), out)
        assert [file.name for file in found.source.files] == [part.name for part in parts]
        for blob in manifest.blobs:
            assert (out / blob.file).read_bytes() == (tmp_path / "wanted" / blob.file).read_bytes()
        shutil.rmtree(out)
    parts[1].unlink()
    with pytest.raises(SourceError, match=rf"{parts[1].name}: missing, a part of the same model"):
        convert(str(parts[0]), tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama__attention__clamp_kqv", 8.0),
        ("llama__attention__scale", 0.5),
        ("llama__attention__sliding_window", 128),
        ("llama__expert_count", 8),
        ("llama__logit_scale", 0.25),
        ("llama__rope__scaling__type", "su"),
        ("llama__something_new", 1),
    ],
)
def test_what_might_change_the_model_is_refused_by_its_key(
    tmp_path: Path, key: str, value: Any
) -> None:
    source = make(tmp_path / "source", "llama", {"num_hidden_layers": 1})
    path = llama_cpp.write_like_llama_cpp(tmp_path / "m.gguf", source, **{key: value})
    with pytest.raises(UnsupportedError, match=r"states (its own attention|llama\.)|scales posi"):
        convert(str(path), tmp_path / "out")


@pytest.mark.parametrize("name", ["rope_factors_long.weight", "rope_factors_short.weight"])
def test_half_of_longropes_factors_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="states LongRoPE without its factors"):
        rope_parameters(
            Stated({"phi3.rope.scaling.original_context_length": 64}, "phi3"),
            {name: np.ones(4, np.float32)},
            head_dim=8,
            partly=True,
            max_tokens=128,
            where="m.gguf",
        )


def test_values_that_change_nothing_are_taken(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "llama", {"num_hidden_layers": 1})
    neutral = {
        "llama__attention__clamp_kqv": 0.0,
        "llama__expert_count": 0,
        "llama__logit_scale": 1.0,
        "llama__rope__scaling__finetuned": True,
    }
    path = llama_cpp.write_like_llama_cpp(tmp_path / "m.gguf", source, **neutral)
    convert(str(path), tmp_path / "out")


def test_a_text_ends_where_the_file_says(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "llama", {"num_hidden_layers": 1})
    path = llama_cpp.write_like_llama_cpp(
        tmp_path / "m.gguf",
        source,
        tokenizer__ggml__eot_token_id=7,
        tokenizer__ggml__eom_token_id=9,
    )
    convert(str(path), tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [257, 7, 9]


def test_frequencies_of_no_known_way_are_refused(tmp_path: Path) -> None:
    rope = {**LLAMA3, "high_freq_factor": 40.0}
    source = make(tmp_path / "source", "llama", {"rope_parameters": rope, "head_dim": 64})
    path = llama_cpp.write_like_llama_cpp(tmp_path / "m.gguf", source)
    convert(str(path), tmp_path / "out")  # unusual, and found nevertheless
    found = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert found == rope
