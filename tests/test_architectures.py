"""A fast part of `make sweep`: types that differ from the rest in what a pass takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.models.sweep import sweep

CAUSAL = (
    "apertus",  # stored buffers
    "bloom",  # ALiBi, a norm before the layers
    "cohere2",  # layers in parallel, some with a sliding window
    "gemma2",  # no SDPA: soft caps
    "gemma4_text",  # stored buffers, two kinds of heads
    "gpt_bigcode",  # one head of keys, learned positions
    "minicpm3",  # latent attention
    "mpt",  # ALiBi, no biases
    "opt",  # its norm is registered first
    "phi",  # rotary embeddings of a part
)
MULTIMODAL = ("gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl")
REFUSED = {
    "bert": "bert is an encoder",
    "cpmant": "a learned prompt of its own",
    "falcon": "those of FalconLinear",
    "gpt2": "Conv1D",
    "mamba2": "another way than a KV cache|a weight of 3 dimensions",
    "rwkv": "another way than a KV cache",
    "mixtral": "a mixture of 8 experts",
    "paligemma": "is multimodal, and not of those",
    "t5gemma2": "an encoder-decoder",
    "xlstm": "states of its own kinds",
}


@pytest.mark.parametrize("name", (*CAUSAL, *MULTIMODAL))
def test_a_type_that_converts_runs_as_with_transformers(name: str, tmp_path: Path) -> None:
    outcome = sweep(name, tmp_path, multimodal=name in MULTIMODAL)
    assert not outcome.fault and not outcome.refusal, outcome
    assert not outcome.difference


@pytest.mark.parametrize("name", REFUSED)
def test_another_type_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    outcome = sweep(name, tmp_path)
    assert re.search(REFUSED[name], outcome.refusal) and not outcome.fault, outcome
