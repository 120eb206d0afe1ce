"""A converted checkpoint is one that transformers loads, with the weights it would have made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.packs.comparing import differing

from layerpack.convert import ConvertOptions, convert
from layerpack.formats.manifest.facts import Role
from layerpack.formats.pack import Pack

ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {}),
    ("qwen2", {"hidden_size": 40, "intermediate_size": 72}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 24}),
    ("gemma2", {"head_dim": 24}),
    ("gemma3_text", {"head_dim": 24}),
    ("phi3", {}),
    ("phi", {}),
    ("olmo2", {}),
    ("gpt_neox", {}),
    ("opt", {"word_embed_proj_dim": 48, "ffn_dim": 160}),
    ("stablelm", {}),
    ("starcoder2", {}),
    ("granite", {}),
    ("cohere", {}),
]


def load(path: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model


def in_four_bit(**kwargs: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        **kwargs,
    )


@pytest.mark.parametrize(("model_type", "config"), ARCHITECTURES, ids=lambda v: str(v)[:40])
def test_flat_pack_loads_as_transformers_own_quantisation(
    make_checkpoint: Any, tmp_path: Path, model_type: str, config: dict[str, Any]
) -> None:
    source = make_checkpoint(model_type, **config)
    manifest = convert(str(source), tmp_path / "out", ConvertOptions(double_quant=False))
    assert Pack.open(tmp_path / "out").manifest == manifest
    ours = load(tmp_path / "out").state_dict()
    # transformers would quantise OPT's two projections around the layers, too; a pack does not.
    skipped = ["lm_head", "project_in", "project_out"] if model_type == "opt" else None
    four_bit = in_four_bit(llm_int8_skip_modules=skipped)
    theirs = load(source, quantization_config=four_bit, dtype=torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert len(manifest.layers) == 3
    assert all(blob.nf4 for blob in manifest.layers)
    assert manifest.blobs[0].tensors[0].name == manifest.model.embedding
    assert manifest.model.num_parameters == sum(p.numel() for p in load(source).parameters())


def test_double_quantisation_differs_by_the_offset_alone(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    source = make_checkpoint("llama")
    convert(str(source), tmp_path / "out")
    ours = load(tmp_path / "out")
    theirs = load(
        source,
        quantization_config=in_four_bit(bnb_4bit_use_double_quant=True),
        dtype=torch.bfloat16,
    )
    compared = 0
    for (name, weight), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        if not hasattr(weight, "quant_state") or weight.quant_state is None:
            continue
        assert torch.equal(weight.data, other.data), name
        values = [dequantize_4bit(p.data, p.quant_state).float() for p in (weight, other)]
        assert (values[0] - values[1]).abs().max() <= 0.02 * values[1].abs().max(), name
        compared += 1
    assert compared == 21


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_any_float_type_is_rounded_to_the_models(
    make_checkpoint: Any, tmp_path: Path, stored: torch.dtype, wanted: str
) -> None:
    source = make_checkpoint("llama", dtype=stored)
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = wanted
    (source / "config.json").write_text(json.dumps(config))
    manifest = convert(str(source), tmp_path / "out", ConvertOptions(double_quant=False))
    dtype = torch.float16 if wanted == "float16" else torch.bfloat16
    assert manifest.model.dtype == ("F16" if wanted == "float16" else "BF16")
    ours = load(tmp_path / "out").state_dict()
    theirs = load(source, quantization_config=in_four_bit(), dtype=dtype).state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_nf4_head_loads_in_transformers(make_checkpoint: Any, tmp_path: Path) -> None:
    source = make_checkpoint("llama", tie_word_embeddings=False)
    manifest = convert(str(source), tmp_path / "out", ConvertOptions(nf4_head=True))
    assert (
        manifest.quantization
        and manifest.quantization.head
        and "lm_head.weight" in manifest.head.nf4
    )
    model = load(tmp_path / "out")
    assert type(model.lm_head).__name__ == "Linear4bit"
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_a_tied_copy_of_the_head_is_left_out(make_checkpoint: Any, tmp_path: Path) -> None:
    source = make_checkpoint("llama", tie_word_embeddings=True, max_shard_size="1GB")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    manifest = convert(str(source), tmp_path / "out")
    names = {entry.name for blob in manifest.blobs for entry in blob.tensors}
    assert "lm_head.weight" not in names and not any("rotary" in name for name in names)
    load(tmp_path / "out")


def test_names_without_the_base_models_prefix(make_checkpoint: Any, tmp_path: Path) -> None:
    source = make_checkpoint("qwen2", tie_word_embeddings=True, max_shard_size="1GB")
    convert(str(source), tmp_path / "plain")
    tensors = load_file(source / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    convert(str(source), tmp_path / "out")
    assert differing(tmp_path / "plain", tmp_path / "out") == ["layerpack.json"]


def test_sharding_and_threads_do_not_change_the_blobs(make_checkpoint: Any, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    packs = []
    try:
        for size, count in (("50KB", 1), ("1GB", 2), ("100KB", 3)):
            torch.set_num_threads(count)
            source = make_checkpoint("mistral", name=f"source-{size}", max_shard_size=size)
            packs.append(tmp_path / f"out-{size}")
            convert(str(source), packs[-1])
    finally:
        torch.set_num_threads(threads)
    for pack in packs[1:]:
        assert differing(packs[0], pack) == ["layerpack.json"]  # the source's files are named there


def test_small_files_come_along_and_code_does_not(make_checkpoint: Any, tmp_path: Path) -> None:
    source = make_checkpoint("llama")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "merges.txt"):
        (source / name).write_text(name)
    for name in ("modeling_x.py", "tokenization_x.py", "pytorch_model.bin", "README.md"):
        (source / name).write_text(name)
    convert(str(source), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE", "merges.txt"} <= names
    assert not names & {"modeling_x.py", "tokenization_x.py", "pytorch_model.bin", "README.md"}
    assert not list(tmp_path.glob("*.layerpack-partial"))


def test_nf4_checkpoint_is_resharded_bit_for_bit(make_checkpoint: Any, tmp_path: Path) -> None:
    plain = make_checkpoint("llama", tie_word_embeddings=False)
    for double_quant in (True, False):
        saved, out = tmp_path / f"nf4-{double_quant}", tmp_path / f"out-{double_quant}"
        model = load(
            plain,
            quantization_config=in_four_bit(bnb_4bit_use_double_quant=double_quant),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(saved, max_shard_size="60KB")
        manifest = convert(str(saved), out)
        assert manifest.quantization and manifest.quantization.double_quant is double_quant
        theirs = {k: v for f in saved.glob("*.safetensors") for k, v in load_file(f).items()}
        ours = {k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()}
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            if name.endswith("quant_state.bitsandbytes__nf4"):
                assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(tensor.tolist()))
            else:
                assert ours[name].dtype == tensor.dtype, name
                assert torch.equal(ours[name], tensor), name
        tokens = torch.arange(12)[None]
        with torch.no_grad():
            before, after = (load(p).train()(tokens).logits for p in (saved, out))
        assert torch.equal(before, after)


def test_fp8_checkpoint_is_dequantised_on_the_way(make_checkpoint: Any, tmp_path: Path) -> None:
    plain = make_checkpoint("llama", hidden_size=128, intermediate_size=256, max_shard_size="1GB")
    tensors, expected = load_file(plain / "model.safetensors"), {}
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if "_proj" not in name:
            stored[name] = expected[name] = tensor
            continue
        rows, columns = tensor.shape
        tiles = tensor.float().reshape(rows // 32, 32, columns // 64, 64)
        scale = tiles.abs().amax((1, 3)) / 448
        stored[name] = (
            (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(rows, columns)
        )
        stored[f"{name}_scale_inv"] = scale
        tiles = stored[name].float().reshape(tiles.shape) * scale[:, None, :, None]
        expected[name] = tiles.reshape(rows, columns).bfloat16()
    convert_to = []
    for name, weights, fields in (
        ("fp8", stored, {"quant_method": "fp8", "weight_block_size": [32, 64]}),
        ("bf16", expected, None),
    ):
        source = tmp_path / name
        source.mkdir()
        config = json.loads((plain / "config.json").read_text())
        if fields:
            config["quantization_config"] = fields
        (source / "config.json").write_text(json.dumps(config))
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        convert_to.append(tmp_path / f"out-{name}")
        convert(str(source), convert_to[-1])
    assert differing(*convert_to) == ["layerpack.json"]


def test_blobs_are_what_the_format_says(make_checkpoint: Any, tmp_path: Path) -> None:
    manifest = convert(str(make_checkpoint("llama")), tmp_path / "out")
    assert [blob.role for blob in manifest.blobs] == [Role.EMBEDDING, *[Role.LAYER] * 3, Role.HEAD]
    for blob in manifest.blobs:
        with safe_open(tmp_path / "out" / blob.file, "pt") as file:
            assert set(file.keys()) == {entry.name for entry in blob.tensors}
        assert all(blob.tensor(name).offset_bytes % 4096 == 0 for name in blob.nf4)
