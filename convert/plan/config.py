"""A checkpoint's config.json: read, and refused where that alone tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerpack.formats.errors import SourceError, UnsupportedError
from layerpack.formats.jsontext import parse_json
from layerpack.libraries import transformers_api

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

_OTHERWISE = {
    "cpmant": "puts a learned prompt of its own before every text",
    "dory": "runs some of its layers several times for a token",
    "xlstm": "keeps states of its own kinds instead of a KV cache",
}


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
    if transformers_api.is_encoder(kind):
        raise UnsupportedError(f"{where}: {kind} is an encoder, which fills gaps; decoders convert")
    if kind in _OTHERWISE:
        raise UnsupportedError(f"{where}: {kind} {_OTHERWISE[kind]}; it does not convert")
    for key in _EXPERT_COUNTS:
        count = fields.get(key)
        if isinstance(count, int) and count > 1:
            raise UnsupportedError(
                f"{where}: {kind} is a mixture of {count} experts, which layerpack does not "
                "convert yet; use a dense model"
            )
