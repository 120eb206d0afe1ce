"""Tiny random checkpoints of many architectures, saved by transformers itself, with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "tie_word_embeddings": False,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_hidden_layers": 4}),
    "llama-odd": (
        "llama",
        {
            "hidden_size": 36,
            "intermediate_size": 51,
            "head_dim": 18,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 301,
        },
    ),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_size": 96}),
    "mistral": ("mistral", {"head_dim": 16}),
    "qwen2": ("qwen2", {"hidden_size": 96, "intermediate_size": 200}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "hidden_size": 72}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4}),
}


def make_checkpoint(path: Path, name: str, *, seed: int = 0, **overrides: Any) -> Path:
    """Save the architecture `name` with random bf16 weights at `path`."""
    import transformers

    model_type, settings = ARCHITECTURES[name]
    fields = _COMMON | settings | overrides
    config = transformers.AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            # The default 0.02 leaves logits so flat that a broken layer would hardly show.
            if parameter.ndim == 2:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
            elif name_.endswith("bias"):
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = fields["eos_token_id"]
    model.generation_config.pad_token_id = fields["pad_token_id"]
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    """A tokenizer of bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>"
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(path)


def make_sharded(path: Path) -> Path:
    """A llama of five layers in several files of at most 120 kB; its directory."""
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(path, "llama", num_hidden_layers=5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="120KB")
    return folder
