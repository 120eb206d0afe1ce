"""The text model that a config.json describes, empty, and what its tensors are called on disk.

Of a multimodal checkpoint that is a part: the causal model of its text config. What stands outside
it, a vision tower for one, is left out, known by the names of the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerpack.convert.plan.config import read_config, refuse_unsupported
from layerpack.formats.errors import UnsupportedError
from layerpack.formats.text import first_line
from layerpack.libraries import transformers_api

WITH_TEXT_MODELS = frozenset(
    {
        "deepseek_vl",
        "exaone4_5",
        "gemma3",
        "gemma4",
        "got_ocr2",
        "hyperclovax_vision_v2",
        "idefics3",
        "internvl",
        "janus",
        "lighton_ocr",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "mistral3",
        "ovis2",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_vl",
        "smolvlm",
        "video_llama_3",
        "vipllava",
    }
)
"""Multimodal types whose text model alone gives the text of the whole, as `make sweep` has seen."""
_PLAIN_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text models without a class of their own, and those that they equal where there is only text.

Their rotary embeddings turn by three positions, of time, height and width: in text, the same one.
"""
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
_ROPE_OF_IMAGES = ("mrope_section", "mrope_interleaved")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """`model` is on the meta device, `fields` its config.json.

    `canonical_name` translates a checkpoint's names, older ones too, to the model's own; `others`
    are the names, translated, of what the checkpoint has beside it, and `whole` its class.
    """

    model: Any
    fields: dict[str, Any]
    canonical_name: Callable[[str], str]
    others: frozenset[str] = frozenset()
    whole: str | None = None


def build_text_model(config_dir: Path) -> TextModel:
    """Reads config.json. Raises SourceError, UnsupportedError for anything that fails."""
    fields = read_config(config_dir)
    where = str(config_dir / "config.json")
    refuse_unsupported(fields, where=where)
    try:
        config = transformers_api.model_config(config_dir)
        text = config.get_text_config()
        if text is config and "vision_config" not in fields:
            if not transformers_api.has_causal_model(config):
                raise UnsupportedError(
                    f"{where}: transformers has no causal language model of the type "
                    f"{config.model_type}"
                )
            model = _empty(config)
            return TextModel(
                model=model,
                fields=fields,
                canonical_name=transformers_api.canonical_names(model),
            )
        if config.model_type in WITH_TEXT_MODELS:
            return _text_of(config, fields)
    except UnsupportedError:
        raise
    except Exception as reason:  # a config that means nothing fails anywhere, in any way
        raise UnsupportedError(
            f"{where}: transformers cannot build a text model from it ({first_line(reason)})"
        ) from reason
    raise UnsupportedError(
        f"{where}: {config.model_type} is multimodal, and not of those types whose text model "
        "layerpack converts (docs/architectures.md)"
    )


def _text_of(config: Any, fields: dict[str, Any]) -> TextModel:
    whole = transformers_api.empty_model(config, dtype=torch.bfloat16, multimodal=True)
    text = _as_plain(config.get_text_config())
    inputs, outputs = whole.get_input_embeddings(), whole.get_output_embeddings()
    text.tie_word_embeddings = outputs.weight is inputs.weight
    model = _empty(text)
    names = {module: name for name, module in whole.named_modules()}
    own = {module: name for name, module in model.named_modules()}
    embedding: str = own[model.get_input_embeddings()]
    common = embedding.removeprefix(f"{model.base_model_prefix}.")
    inside = names[inputs].removesuffix(common)
    head = {f"{names[outputs]}.": f"{own[model.get_output_embeddings()]}."}
    moved: dict[str, str] = {**head, inside: embedding.removesuffix(common)}
    canonical = transformers_api.canonical_names(whole)

    def canonical_name(stored: str) -> str:
        name: str = canonical(stored)
        for old, new in moved.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    others = {canonical_name(name) for name in whole.state_dict()} - model.state_dict().keys()
    described = json.loads(text.to_json_string(use_diff=True))
    described |= {key: fields[key] for key in _OF_THE_WHOLE if fields.get(key) is not None}
    described |= {"architectures": [type(model).__name__], "dtype": _dtype(fields, described)}
    return TextModel(
        model=model,
        fields=described,
        canonical_name=canonical_name,
        others=frozenset(others),
        whole=type(whole).__name__,
    )


def _as_plain(text: Any) -> Any:
    """The text config, or that of the model that it equals."""
    kind = _PLAIN_TYPES.get(text.model_type)
    if kind is None:
        return text
    fields = json.loads(text.to_json_string(use_diff=False))
    fields["rope_parameters"] = {
        key: value for key, value in text.rope_parameters.items() if key not in _ROPE_OF_IMAGES
    }
    return transformers_api.config_of_type(kind, {**fields, "model_type": kind})


def _empty(config: Any) -> Any:
    return transformers_api.empty_model(config, dtype=torch.bfloat16)


def _dtype(fields: dict[str, Any], described: dict[str, Any]) -> str:
    for stated in (fields, described):
        value = stated.get("dtype", stated.get("torch_dtype"))
        if isinstance(value, str):
            return value
    return "bfloat16"
