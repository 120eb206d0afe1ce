"""Config, tokenizer and generation settings out of a GGUF file, as a checkpoint has them."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from layerpack.formats.errors import UnsupportedError
from layerpack.formats.jsontext import dump_json

_NOT_OURS = ("quantization_config", "_name_or_path", "_model_name_or_path")


def write_config_dir(path: Path, target: Path) -> tuple[Any, dict[str, Any]]:
    """Write config.json, generation_config.json, tokenizer and chat template into `target`.

    Returns the model, empty, on the meta device, and what transformers parsed from the file.
    Raises UnsupportedError; other exceptions are transformers' and mean a damaged file.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    parameters = load_gguf_checkpoint(str(path), return_tensors=False)
    try:
        config = CONFIG_MAPPING[parameters["config"]["model_type"]].from_dict(parameters["config"])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, trust_remote_code=False
            )
    except Exception as reason:
        text = str(reason).strip().splitlines() or [type(reason).__name__]
        raise UnsupportedError(
            f"{path}: transformers cannot build a text model from it ({text[0][:200]})"
        ) from reason
    fields = json.loads(config.to_json_string(use_diff=True))
    for key in _NOT_OURS:
        fields.pop(key, None)
    fields |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    (target / "config.json").write_bytes(dump_json(fields))
    (target / "generation_config.json").write_bytes(dump_json(_generation(parameters, config)))
    _write_tokenizer(path, target, parameters["tokenizer"])
    return model, parameters


def _generation(parameters: dict[str, Any], config: Any) -> dict[str, Any]:
    """Special tokens as the GGUF file's tokenizer has them, else as the config does."""
    stated = parameters["tokenizer"] | parameters.get("tokenizer_config", {})
    result = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = stated.get(key, getattr(config, key, None))
        if value is not None:
            result[key] = value
    return result


def _write_tokenizer(path: Path, target: Path, stated: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    with TemporaryDirectory(prefix="layerpack-gguf-") as alone:
        # transformers reads any tokenizer files beside the GGUF file, which may be another model's.
        directory = Path(alone)
        try:
            (directory / path.name).symlink_to(path.absolute())
        except OSError:
            directory = path.parent
        tokenizer = AutoTokenizer.from_pretrained(
            directory, gguf_file=path.name, trust_remote_code=False
        )
        for role in ("bos", "eos", "pad"):
            # Some versions of transformers (5.17) take one special token for another.
            if (index := stated.get(f"{role}_token_id")) is not None:
                setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(int(index)))
        tokenizer.save_pretrained(target)
    # Traces of this machine, which would be copied into the pack.
    config = target / "tokenizer_config.json"
    fields = json.loads(config.read_bytes())
    for key in ("is_local", "local_files_only", "name_or_path"):
        fields.pop(key, None)
    config.write_bytes(dump_json(fields))
