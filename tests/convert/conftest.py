"""Tiny random checkpoints of real architectures, saved by transformers itself."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

MakeCheckpoint = Callable[..., Path]

_COMMON = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """make_checkpoint(model_type, dtype=…, max_shard_size=…, **config) -> directory."""

    def make(
        model_type: str,
        *,
        name: str = "checkpoint",
        dtype: torch.dtype = torch.bfloat16,
        max_shard_size: str = "100KB",
        **config: Any,
    ) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        fields = {**_COMMON, **config}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
        with torch.no_grad():
            for parameter in model.parameters():  # norms of ones and biases of zeros hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.02)
        path = tmp_path / name
        model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
        return path

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MB. Skips where none may be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", str(path)], check=True)
