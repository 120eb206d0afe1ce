"""A checkpoint's config.json: read, refused where it must be, and built, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from layerpack.formats.errors import SourceError, UnsupportedError
from layerpack.formats.jsontext import parse_json

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_OTHER_INPUTS = ("vision_config", "audio_config", "vision_tower", "speech_config")


def read_config(config_dir: Path) -> dict[str, Any]:
    """config.json as it is. Raises SourceError if it is missing or not a JSON object."""
    path = config_dir / "config.json"
    try:
        config = parse_json(path.read_bytes())
    except OSError as reason:
        raise SourceError(f"{path}: cannot be read ({reason.strerror})") from reason
    except ValueError as reason:
        raise SourceError(f"{path}: not valid JSON ({reason})") from None
    if not isinstance(config, dict):
        raise SourceError(f"{path}: not a JSON object")
    return config


def refuse_unsupported(fields: dict[str, Any], *, where: str) -> None:
    """Raises UnsupportedError for a kind of model that a config alone gives away."""
    from transformers import CONFIG_MAPPING

    kind = fields.get("model_type")
    if not isinstance(kind, str):
        raise UnsupportedError(f'{where}: no "model_type" in it; not a transformers checkpoint')
    if kind not in CONFIG_MAPPING:
        hint = (
            "it needs code from its repository, which is never run"
            if "auto_map" in fields
            else "the installed transformers does not know it"
        )
        raise UnsupportedError(f"{where}: model_type {kind!r} is not supported; {hint}")
    if fields.get("is_encoder_decoder"):
        raise UnsupportedError(f"{where}: {kind} is an encoder-decoder; only decoders convert")
    for key in _EXPERT_COUNTS:
        count = fields.get(key)
        if isinstance(count, int) and count > 1:
            raise UnsupportedError(
                f"{where}: {kind} is a mixture of {count} experts, which layerpack does not "
                "convert yet; use a dense model"
            )
    for key in _OTHER_INPUTS:
        if fields.get(key) is not None:
            raise UnsupportedError(
                f"{where}: {kind} is multimodal ({key}); only text models convert"
            )


def build_empty(config_dir: Path, *, where: str) -> Any:
    """The model on the meta device. Any failure of transformers' becomes an UnsupportedError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            config_dir, trust_remote_code=False, local_files_only=True
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, dtype=torch.bfloat16
            )
    except Exception as reason:
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        raise UnsupportedError(
            f"{where}: transformers cannot build a text model from it ({lines[0][:200]})"
        ) from reason
