"""What a model consists of, found by building it, empty, from its config.

transformers defines the model on torch's meta device (no memory, no weights); the decoder layers,
the embedding and lm_head are then found by what they are, so no table of model names is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerpack.convert.plan.text_model import build_text_model
from layerpack.formats.errors import UnsupportedError
from layerpack.libraries import transformers_api
from layerpack.libraries.dtypes import SAFETENSORS_DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One tensor that the model wants, by transformers' name. `linear`: an nn.Linear's weight."""

    name: str
    shape: tuple[int, ...]
    floating: bool
    linear: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The parts of a dense decoder-only model, each in the order of the module tree.

    `before` are the tensors outside the layers that stand before them, the input embedding first;
    `after` the other ones, lm_head's weight (`output`) first; a tied one is not among them.
    `canonical_name` translates older names in checkpoints to the model's own, as transformers does
    on loading; `ignored` are patterns of checkpoint tensors that transformers, too, leaves unread.
    `others` are names of what a multimodal model, of the class `whole`, has beside its text model.
    `config` is the model's config.json.
    `dtype` is F16 where the config says float16, else BF16: what 16-bit tensors are stored in.
    """

    architecture: str
    base_prefix: str
    layers_path: str
    dtype: str
    embedding: str
    output: str
    tied: bool
    before: tuple[Parameter, ...]
    layers: tuple[tuple[Parameter, ...], ...]
    after: tuple[Parameter, ...]
    canonical_name: Callable[[str], str]
    ignored: tuple[str, ...]
    others: frozenset[str]
    whole: str | None
    config: dict[str, Any]

    @property
    def head(self) -> str:
        """Name of the stored tensor that lm_head uses."""
        return self.embedding if self.tied else self.output

    @property
    def parameters(self) -> Iterator[Parameter]:
        """All of them, in the order of use."""
        yield from self.before
        for layer in self.layers:
            yield from layer
        yield from self.after


def find_structure(config_dir: Path) -> Structure:
    """The structure of the model that config.json describes. Raises UnsupportedError by name."""
    where = str(config_dir / "config.json")
    text = build_text_model(config_dir)
    model, fields = text.model, text.fields
    if not transformers_api.takes_kv_cache(model):
        raise UnsupportedError(f"{where}: {_title(model)} remembers in another way than a KV cache")
    path, layers = _layers(model, getattr(model.config, "num_hidden_layers", 0), where)
    # Subclasses compute something of their own, and transformers quantises none of them.
    linears = {
        f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear
    }
    state = {
        name: Parameter(
            name=name,
            shape=tuple(tensor.shape),
            floating=tensor.is_floating_point(),
            linear=name in linears,
        )
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    embedding, output, tied = _embedding_and_head(model, where)
    before, after = _around(state, f"{path}.", embedding, output, tied)
    if not after:
        raise UnsupportedError(f"{where}: {_title(model)} has nothing after its layers")
    per_layer = tuple(_below(state, f"{path}.{index}.") for index in range(len(layers)))
    _refuse_by_layers(model, layers, per_layer, where)
    return Structure(
        architecture=_title(model),
        base_prefix=f"{model.base_model_prefix}.",
        layers_path=path,
        dtype=SAFETENSORS_DTYPES[
            torch.float16 if _config_dtype(fields) == "float16" else torch.bfloat16
        ],
        embedding=embedding,
        output=output,
        tied=tied,
        before=before,
        layers=per_layer,
        after=after,
        canonical_name=text.canonical_name,
        ignored=(r"rotary_emb\.inv_freq$", *transformers_api.ignored_patterns(model)),
        others=text.others,
        whole=text.whole,
        config=fields,
    )


def _config_dtype(fields: dict[str, Any]) -> str:
    value = fields.get("dtype", fields.get("torch_dtype"))
    return value.removeprefix("torch.") if isinstance(value, str) else ""


def _title(model: Any) -> str:
    return type(model).__name__


def _layers(model: Any, count: int, where: str) -> tuple[str, nn.ModuleList]:
    found = [
        module
        for module in model.base_model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1 or not count:
        raise UnsupportedError(
            f"{where}: {_title(model)} has {len(found)} lists of {count} modules where one "
            "list of decoder layers is wanted"
        )
    (path,) = (name for name, module in model.named_modules() if module is found[0])
    return path, found[0]


def _embedding_and_head(model: Any, where: str) -> tuple[str, str, bool]:
    """Names of the two weights, and whether they are the same one."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if not isinstance(inputs, nn.Embedding) or not isinstance(outputs, nn.Linear):
        raise UnsupportedError(f"{where}: {_title(model)} has no plain embedding and lm_head")
    tied = outputs.weight is inputs.weight
    return f"{names[inputs]}.weight", f"{names[outputs]}.weight", tied


def _below(state: dict[str, Parameter], prefix: str) -> tuple[Parameter, ...]:
    return tuple(parameter for name, parameter in state.items() if name.startswith(prefix))


def _refuse_by_layers(
    model: Any,
    layers: nn.ModuleList,
    per_layer: tuple[tuple[Parameter, ...], ...],
    where: str,
) -> None:
    for module in layers.modules():
        if type(module).__name__ == "Conv1D":
            raise UnsupportedError(
                f"{where}: {_title(model)} keeps its matrices transposed (Conv1D), "
                "which layerpack does not convert"
            )
    for parameters in per_layer:
        for parameter in parameters:
            if len(parameter.shape) > 2:
                raise UnsupportedError(
                    f"{where}: {_title(model)} has a weight of {len(parameter.shape)} dimensions "
                    f"({parameter.name}): fused experts or convolutions do not convert"
                )
        if not any(parameter.linear for parameter in parameters):
            kinds = {type(m).__name__ for m in layers.modules() if isinstance(m, nn.Linear)}
            which = f" but those of {', '.join(sorted(kinds))}" if kinds else ""
            raise UnsupportedError(
                f"{where}: {_title(model)} has layers without linear weights{which}, which "
                "transformers does not quantise"
            )


def _around(
    state: dict[str, Parameter], layers_prefix: str, embedding: str, output: str, tied: bool
) -> tuple[tuple[Parameter, ...], tuple[Parameter, ...]]:
    """What stands before the layers, the embedding first, and the rest, lm_head first."""
    before, after, passed = [state[embedding]], [] if tied else [state[output]], False
    for name, parameter in state.items():
        if name.startswith(layers_prefix):
            passed = True
        elif name not in (embedding, output):
            (after if passed else before).append(parameter)
    if not after:  # OPT registers its final norm before its layers
        before, after = before[:1], before[1:]
    return tuple(before), tuple(after)
