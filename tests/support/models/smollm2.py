"""SmolLM2-135M-Instruct as a plain bf16 checkpoint, made from its GGUF file by transformers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch


def make_checkpoint(gguf: Path, path: Path) -> None:
    """Write the checkpoint at `path`, which appears whole or not at all. Takes half a minute."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # transformers does not save what it read from GGUF, so the weights move to a plain model.
    settings = json.loads(read.config.to_json_string(use_diff=False))
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    settings["architectures"] = [type(read).__name__]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="making-") as scratch:
        whole = Path(scratch) / path.name
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(path)
