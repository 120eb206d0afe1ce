"""Models whose lm_head is the embedding, and checkpoints that store both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.oracles import quantised_reference
from support.packs.comparing import differing
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from layerpack.convert import convert
from layerpack.formats.errors import SourceError

MakeCheckpoint = Callable[..., Path]


def with_head(source: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The checkpoint with a stored lm_head, made by `change` from the embedding."""
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"]).contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def tied(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("llama", tie_word_embeddings=True, max_shard_size="1GB")


def test_a_stored_head_that_is_the_embedding_changes_nothing(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerpack.convert.pipeline.weights.PIECE_BYTES", 8192)
    source = tied(make_checkpoint)
    convert(str(source), tmp_path / "plain")
    convert(str(with_head(source, torch.clone)), tmp_path / "out")
    assert differing(tmp_path / "plain", tmp_path / "out") == ["layerpack.json"]  # the source's


def test_a_stored_head_that_is_not_the_embedding_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """transformers runs such a model with both, so one of them must not vanish."""

    def changed(embedding: torch.Tensor) -> torch.Tensor:
        head = embedding.clone()
        head[-1, -1] += 1
        return head

    source = with_head(tied(make_checkpoint), changed)
    model = AutoModelForCausalLM.from_pretrained(source)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    with pytest.raises(
        SourceError, match=r"^tensors .*embed_tokens.weight and lm_head.weight diff"
    ):
        convert(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with_head(source, lambda embedding: embedding[:-1].clone())
    with pytest.raises(SourceError, match=r"lm_head.weight has the shape \[299, 96\]"):
        convert(str(source), tmp_path / "out")


def test_transformers_loads_a_tied_nf4_checkpoint_with_more_modules_in_16_bits(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("llama", tie_word_embeddings=True, hidden_size=128)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.up_proj"],
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=four_bit)
    model.save_pretrained(tmp_path / "nf4")
    convert(str(tmp_path / "nf4"), tmp_path / "out")
    wanted, found = (quantised_reference(path) for path in (tmp_path / "nf4", tmp_path / "out"))
    assert found.lm_head.weight is found.model.embed_tokens.weight
    ids = torch.arange(10)[None]
    assert torch.equal(found(ids).logits, wanted(ids).logits)
