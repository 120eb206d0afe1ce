"""Config, tokenizer and generation settings out of a GGUF file, as a checkpoint has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from layerpack.convert.gguf.metadata import config_fields
from layerpack.formats.errors import LayerpackError, UnsupportedError
from layerpack.formats.jsontext import dump_json
from layerpack.formats.text import first_line
from layerpack.libraries import gguf_api, transformers_api

_NOT_OURS = ("quantization_config", "_name_or_path", "_model_name_or_path")
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<EOT>",
        "[EOT]",
    }
)
"""Control tokens that llama.cpp ends a text at, whatever the metadata says."""
_CONTROL, _USER_DEFINED = 3, 4


def write_config_dir(
    where: str, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any], target: Path
) -> tuple[Any, dict[str, Any]]:
    """Write config.json, generation_config.json, tokenizer and chat template into `target`.

    `metadata` is all that the file at `path` states, `tensors` the arrays of the whole model by
    name; `where` is for messages. Returns the model, empty, on the meta device, and its config's
    fields. Raises UnsupportedError; other exceptions are transformers' and mean a damaged file.
    """
    parsed = gguf_api.parsed_metadata(path)
    try:
        model_type = parsed["config"]["model_type"]
        fields = config_fields(
            metadata,
            parsed["config"],
            gguf_api.keys_in_config(str(metadata["general.architecture"])),
            tensors,
            transformers_api.default_fields(model_type),
            where=where,
        )
        config = transformers_api.config_of_type(model_type, fields)
        model = transformers_api.empty_model(config, dtype=torch.bfloat16)
    except LayerpackError:
        raise
    except Exception as reason:
        raise UnsupportedError(
            f"{where}: transformers cannot build a text model from it ({first_line(reason)})"
        ) from reason
    described = json.loads(config.to_json_string(use_diff=True))
    for key in _NOT_OURS:
        described.pop(key, None)
    described |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    (target / "config.json").write_bytes(dump_json(described))
    generation = dump_json(_generation(metadata, parsed, config))
    (target / "generation_config.json").write_bytes(generation)
    _write_tokenizer(path, target, parsed["tokenizer"])
    return model, fields


def _generation(
    metadata: Mapping[str, Any], parsed: Mapping[str, Any], config: Any
) -> dict[str, Any]:
    """Special tokens as the GGUF file's tokenizer has them, else as the config does.

    Where a text ends at several tokens, all of them.
    """
    stated = parsed["tokenizer"] | parsed.get("tokenizer_config", {})
    result = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = stated.get(key, getattr(config, key, None))
        if value is not None:
            result[key] = value
    ends = [result.get("eos_token_id")]
    ends += [metadata.get(f"tokenizer.ggml.{key}") for key in _ENDS]
    kinds = stated.get("token_type") or []
    for index, (token, kind) in enumerate(zip(stated.get("tokens", ()), kinds, strict=False)):
        if kind in (_CONTROL, _USER_DEFINED) and token in _END_TEXTS:
            ends.append(index)
    known = list(dict.fromkeys(int(end) for end in ends if end is not None))
    if known:
        result["eos_token_id"] = known if len(known) > 1 else known[0]
    return result


def _write_tokenizer(path: Path, target: Path, stated: dict[str, Any]) -> None:
    with TemporaryDirectory(prefix="layerpack-gguf-") as alone:
        # transformers reads any tokenizer files beside the GGUF file, which may be another model's.
        directory = Path(alone)
        try:
            (directory / path.name).symlink_to(path.absolute())
        except OSError:
            directory = path.parent
        tokenizer = gguf_api.load_tokenizer(directory, path.name)
        for role in ("bos", "eos", "pad"):
            # Some versions of transformers take one special token for another.
            if (index := stated.get(f"{role}_token_id")) is not None:
                setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(int(index)))
        tokenizer.save_pretrained(target)
    # Traces of this machine, which would be copied into the pack.
    config = target / "tokenizer_config.json"
    fields = json.loads(config.read_bytes())
    for key in ("is_local", "local_files_only", "name_or_path"):
        fields.pop(key, None)
    config.write_bytes(dump_json(fields))
