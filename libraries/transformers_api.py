"""transformers: models without weights, their names in checkpoints, and what a forward is called.

Everything that is not documented there, or was renamed between the versions that layerpack runs
with, is used in this file and in its neighbours `transformers_rope.py` and `gguf_api.py` alone.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerpack.formats.text import first_line
from layerpack.libraries.torch_api import buffers_of, set_buffer


def quiet() -> Any:
    """`transformers`, imported; its warnings and bars are not for users of layerpack."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def model_config(config_dir: Path) -> Any:
    """The config that config.json in `config_dir` describes. Raises what transformers raises."""
    return quiet().AutoConfig.from_pretrained(
        config_dir, trust_remote_code=False, local_files_only=True
    )


def config_of_type(model_type: str, fields: dict[str, Any]) -> Any:
    """The config of a type out of the fields of its config.json."""
    return quiet().CONFIG_MAPPING[model_type].from_dict(fields)


def default_fields(model_type: str) -> dict[str, Any]:
    """The fields of a type's config, with its own values."""
    fields: dict[str, Any] = quiet().CONFIG_MAPPING[model_type]().to_dict()
    return fields


def empty_model(
    config: Any, *, dtype: torch.dtype, attention: str | None = None, multimodal: bool = False
) -> Any:
    """The causal model of a config on the meta device: no memory, no weights, nothing quantised.

    `attention` None is transformers' own choice: not every model has an implementation with SDPA.
    `multimodal`: the model that takes images, too. Raises what transformers raises.
    """
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # else transformers would swap layers by itself
    how = {} if attention is None else {"attn_implementation": attention}
    library = quiet()
    kind = library.AutoModelForImageTextToText if multimodal else library.AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config, dtype=dtype, trust_remote_code=False, **how)


def fill_buffers(model: Any, device: torch.device) -> None:
    """Compute on `device` what a model keeps beside its weights and no checkpoint stores.

    Rotary tables, embedding scales and the like follow from the config. Stored buffers stay on the
    meta device.
    """
    stored = set(model.state_dict())
    modules = dict(model.named_modules())
    for path, module in modules.items():
        names = [
            name
            for name, buffer in buffers_of(module).items()
            if buffer.is_meta and f"{path}.{name}".lstrip(".") not in stored
        ]
        for name in names:
            set_buffer(module, name, torch.empty_like(buffers_of(module)[name], device=device))
        if names:
            _nearest_model(modules, path)._init_weights(module)


def _nearest_model(modules: dict[str, nn.Module], path: str) -> Any:
    """The model, or part of one, that knows how to initialise the module at `path`."""
    while not hasattr(modules[path], "_init_weights"):
        path = path.rpartition(".")[0]
    return modules[path]


def is_encoder(model_type: str) -> bool:
    """Whether models of the type fill gaps, and see what follows them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def takes_kv_cache(model: Any) -> bool:
    """Whether a forward reads and extends a KV cache; others keep states of their own kinds."""
    known = inspect.signature(type(model).forward).parameters
    return "cache_params" not in known and not known.keys().isdisjoint(("cache", "past_key_values"))


def has_causal_model(config: Any) -> bool:
    """Whether there is a class for a causal language model of this config."""
    return type(config) in quiet().MODEL_FOR_CAUSAL_LM_MAPPING


def canonical_names(model: Any) -> Callable[[str], str]:
    """Older names in checkpoints to the model's own, by the table that transformers loads with."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    table = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]

    def canonical(name: str) -> str:
        for renaming in table:
            name, _ = renaming.rename_source_key(name)
        return name

    return canonical


def ignored_patterns(model: Any) -> tuple[str, ...]:
    """Regular expressions of checkpoint tensors that transformers, too, leaves unread."""
    return tuple(model._keys_to_ignore_on_load_unexpected or ())


def forward_arguments(network: Any, cache: Any, logits: int) -> dict[str, Any]:
    """Arguments of a forward that reads and extends `cache`, with the last `logits` rows of logits.

    `cache` None: of one that keeps nothing.
    The cache is called `cache` from transformers 5.24 on, and `past_key_values` before.
    """
    known = inspect.signature(type(network).forward).parameters
    arguments: dict[str, Any] = {"use_cache": cache is not None}
    if cache is not None:
        arguments["cache" if "cache" in known else "past_key_values"] = cache
    if "logits_to_keep" in known:
        arguments["logits_to_keep"] = logits
    return arguments


def takes_attention_functions(network: Any) -> bool:
    """Whether its layers call attention through transformers' AttentionInterface."""
    return bool(getattr(network, "_supports_attention_backend", False))


@contextlib.contextmanager
def attention_by(network: Any, function: Callable[..., Any]) -> Iterator[None]:
    """In the block the network's layers call `function` for attention, and no mask is made."""
    interface = quiet().AttentionInterface
    name = f"layerpack_{id(network)}"  # the table is every network's
    interface.register(name, function)
    configs = {id(config): config for config in (network.config, network.config.get_text_config())}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    for config, _ in before:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, usual in before:
            config._attn_implementation_internal = usual
        interface._global_mapping.pop(name)


def swap_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in the model."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


def generation_config_problem(raw: bytes) -> str | None:
    """Why transformers cannot use a generation_config.json of these bytes; None if it can."""
    try:
        fields = json.loads(raw)
        if not isinstance(fields, dict):
            return "it is not a JSON object"
        quiet().GenerationConfig.from_dict(fields)
    except Exception as reason:
        return f"it is not usable ({first_line(reason)})"
    return None


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a checkpoint's or pack's directory. Raises what transformers raises.

    Of Mistral's tokenizers those saved before transformers 5 split words wrongly, and are mended.
    """
    how = {"fix_mistral_regex": True} if "stral" in _model_type(path) else {}
    tokenizer = quiet().AutoTokenizer.from_pretrained(
        path, trust_remote_code=False, local_files_only=True, **how
    )
    # Whether that took place, some versions note on what they wrap alone.
    inner = getattr(tokenizer, "_tokenizer", None)
    if getattr(inner, "fix_mistral_regex", False):
        tokenizer.fix_mistral_regex = True
    return tokenizer


def _model_type(path: Path) -> str:
    try:
        found = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return ""
    return str(found.get("model_type")) if isinstance(found, dict) else ""
