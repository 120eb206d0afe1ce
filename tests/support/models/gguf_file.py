"""A tiny GGUF file: random weights of any quantisation, GPT-2's byte tokens. Skips without gguf."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from layerpack.convert.gguf.files import LocalFiles
from layerpack.convert.gguf.source import GgufSource

gguf = pytest.importorskip("gguf")

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS = 128, 192, 4, 2, 2
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def byte_tokens() -> list[str]:
    """The 256 byte tokens of GPT-2, two merged tokens and three special ones."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*bytes_to_unicode().values(), "ab", "ba", "<s>", "</s>", "<unk>"]


def write_gguf(
    path: Path, *, architecture: str = "llama", tied: bool = True, kind: str = "Q8_0"
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    tokens = byte_tokens()
    writer.add_name("Tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3] * 3)
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_pad_token_id(259)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    quantised = gguf.GGMLQuantizationType[kind]

    def add(name: str, *shape: int) -> None:
        values = random.normal(0, 0.05, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            data = gguf.quantize(values, quantised)
            writer.add_tensor(name, data, raw_dtype=quantised)

    key_value = HIDDEN // HEADS * KV_HEADS
    add("token_embd.weight", len(tokens), HIDDEN)
    writer.add_tensor("rope_freqs.weight", np.ones(HIDDEN // HEADS // 2, np.float32))
    for layer in range(LAYERS):
        for name, *shape in (
            ("attn_norm", HIDDEN),
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", key_value, HIDDEN),
            ("attn_v", key_value, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_norm", HIDDEN),
            ("ffn_gate", INTERMEDIATE, HIDDEN),
            ("ffn_up", INTERMEDIATE, HIDDEN),
            ("ffn_down", HIDDEN, INTERMEDIATE),
        ):
            add(f"blk.{layer}.{name}.weight", *shape)  # type: ignore[arg-type]
        if architecture == "qwen2":
            for name, width in (("attn_q", HIDDEN), ("attn_k", key_value), ("attn_v", key_value)):
                add(f"blk.{layer}.{name}.bias", width)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", len(tokens), HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_gguf(path: Path) -> GgufSource:
    """The model at `path` as a source, ready to be read."""
    source = GgufSource.open(LocalFiles(path))
    for file in source.files:
        source.fetch(file.name, lambda _: None)
    return source
