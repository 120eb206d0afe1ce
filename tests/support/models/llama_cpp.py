"""A checkpoint's directory as a GGUF file, with the keys and tensors of llama.cpp's converter.

Source: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

gguf = pytest.importorskip("gguf")

_ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}
_PLUS_ONE = ("gemma2", "gemma3", "nemotron")


def write_like_llama_cpp(
    path: Path, source: Path, *, kind: str = "BF16", parts: int = 1, **more_keys: Any
) -> Path:
    """Write the model in `source` to `path`, or to that many parts; where it, or the first, is.

    `kind` is how matrices are stored: F32, BF16, F16. `more_keys` are further facts.
    """
    config = json.loads((source / "config.json").read_text())
    architecture = _ARCHITECTURES.get(config["model_type"], config["model_type"])
    tensors = dict(_tensors(config, architecture, load_file(source / "model.safetensors")))
    names = list(tensors)
    paths = [path]
    if parts > 1:
        paths = [
            path.with_name(f"{path.stem}-{n:05}-of-{parts:05}.gguf") for n in range(1, parts + 1)
        ]
    for number, target in enumerate(paths):
        writer = gguf.GGUFWriter(target, architecture)
        if number == 0:
            _write_keys(writer, config, architecture, more_keys)
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
        for name in names[number::parts]:
            _write_tensor(writer, name, tensors[name], kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths[0]


def _write_tensor(writer: Any, name: str, values: np.ndarray[Any, Any], kind: str) -> None:
    if values.ndim == 1 or kind == "F32":
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        return
    how = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quantize(values.astype(np.float32), how), raw_dtype=how)


def _write_keys(
    writer: Any, config: dict[str, Any], architecture: str, more: dict[str, Any]
) -> None:
    heads = config.get("num_attention_heads", config.get("n_head"))
    hidden = config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_name("Tiny")
    writer.add_block_count(config.get("num_hidden_layers", config.get("n_layer")))
    writer.add_context_length(config.get("max_position_embeddings", 256))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config.get("intermediate_size", 4 * hidden))
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    for key, add in (
        ("rms_norm_eps", writer.add_layer_norm_rms_eps),
        ("layer_norm_epsilon", writer.add_layer_norm_eps),
        ("layer_norm_eps", writer.add_layer_norm_eps),
        ("norm_epsilon", writer.add_layer_norm_eps),
        ("norm_eps", writer.add_layer_norm_eps),
    ):
        if key in config:
            add(config[key])
    if config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if "rope_parameters" in config:
        _write_rope(writer, config, architecture, head_dim)
    _write_own_keys(writer, config, architecture)
    _write_tokenizer(writer, config["vocab_size"])
    for name, value in more.items():
        key = name.replace("__", ".")
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)


def _write_own_keys(writer: Any, config: dict[str, Any], architecture: str) -> None:
    if architecture in ("gemma2", "gemma3", "phi3") and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if architecture == "stablelm":
        writer.add_parallel_residual(config["use_parallel_residual"])
    if architecture in ("llama", "phi3"):
        writer.add_vocab_size(config["vocab_size"])


def _write_rope(writer: Any, config: dict[str, Any], architecture: str, head_dim: int) -> None:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    share = rope.get("partial_rotary_factor", 1.0)
    if architecture in ("llama", "phi3", "stablelm", "nemotron"):
        writer.add_rope_dimension_count(int(share * head_dim))
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(
            config.get("original_max_position_embeddings", config["max_position_embeddings"])
        )
    match rope["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        case "longrope":
            first = rope["original_max_position_embeddings"]
            times = config["max_position_embeddings"] / first
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(times) / math.log(first)))


def _write_tokenizer(writer: Any, vocab_size: int) -> None:
    """A token a byte, 256 and 257 for begin and end, one merged token, and unused ones."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*sorted(bytes_to_unicode().values()), "<|begin|>", "<|end|>", "ab"]
    tokens += [f"[PAD{index}]" for index in range(len(tokens), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 2 + [1] + [5] * (vocab_size - 259))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)


def _tensors(
    config: dict[str, Any], architecture: str, state: dict[str, torch.Tensor]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    (arch,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    heads = int(config.get("num_attention_heads", config.get("n_head", 0)))
    names = gguf.get_tensor_name_map(arch, layers)
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            values = _permuted(values, heads if "q_proj" in name else config["num_key_value_heads"])
        if architecture in _PLUS_ONE and name.endswith("norm.weight"):
            values = values + 1
        if architecture == "bloom" and "query_key_value" in name:
            shaped = values.reshape(heads, 3, -1, *values.shape[1:])
            values = shaped.swapaxes(0, 1).reshape(values.shape)
        # Of Bloom the converter knows the base model's names.
        found = names.get_name(name.removeprefix("transformer."), (".weight", ".bias"))
        found = found or names.get_name(name, (".weight", ".bias"))
        assert found is not None, name
        yield found, values
    yield from _rope_tensors(config)


def _permuted(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _rope_tensors(config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    rope = config.get("rope_parameters", {})
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            yield f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32)
    if rope.get("rope_type") != "llama3":
        return
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    first, factors = rope["original_max_position_embeddings"], []
    for frequency in frequencies:
        length = 2 * math.pi / frequency
        if length < first / high:
            factors.append(1.0)
        elif length > first / low:
            factors.append(rope["factor"])
        else:
            smooth = (first / length - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / rope["factor"] + smooth)))
    yield "rope_freqs.weight", np.array(factors, np.float32)
