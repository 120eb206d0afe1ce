"""The model's definition from transformers, built without weights, its linear layers swapped.

The checkpoint's config decides everything; no code from a checkpoint is ever run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layerpack.formats.errors import PackError
from layerpack.formats.pack import Pack
from layerpack.formats.text import first_line
from layerpack.libraries.dtypes import TORCH_DTYPES
from layerpack.libraries.transformers_api import empty_model, fill_buffers, model_config
from layerpack.runtime.network.linear import Nf4Linear


def build_skeleton(pack: Pack, *, device: torch.device, attention: str | None = None) -> Any:
    """transformers' model for `pack`: weights on the meta device, computed buffers on `device`.

    Every linear layer that the pack stores in NF4 is an Nf4Linear. `attention` None leaves the
    choice to transformers. Raises PackError if the model that config.json describes is not the
    one that the manifest lists.
    """
    manifest = pack.manifest
    dtype = TORCH_DTYPES[manifest.model.dtype]
    try:
        model = empty_model(model_config(pack.path), dtype=dtype, attention=attention)
    except Exception as reason:  # a damaged config breaks transformers in any way
        raise PackError(
            f"{pack.path / 'config.json'}: not usable ({first_line(reason)})"
        ) from reason
    for blob in manifest.blobs:
        for name, state in blob.nf4.items():
            _swap_linear(model, name, state.shape, dtype)
    layers = decoder_layers(model, manifest.model.layers_path)
    if len(layers) != manifest.model.num_layers:
        raise PackError(
            f"{pack.path}: config.json describes {len(layers)} layers, layerpack.json "
            f"{manifest.model.num_layers}; convert again"
        )
    _check_names(model, pack)
    fill_buffers(model, device)
    _take_end_tokens(model, pack)
    return model.eval()


def decoder_layers(model: nn.Module, path: str) -> nn.ModuleList:
    """The list of decoder layers at `path`. Raises PackError."""
    try:
        layers = model.get_submodule(path)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList):
        raise PackError(f"the model has no list of layers at {path}; convert again")
    return layers


def _swap_linear(model: nn.Module, weight: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    path = weight.removesuffix(".weight")
    try:
        old = model.get_submodule(path)
    except AttributeError:
        old = None
    if not isinstance(old, nn.Linear) or tuple(old.weight.size()) != tuple(shape):
        raise PackError(
            f"{weight}: the pack has shape {tuple(shape)}, but config.json describes {old}"
        )
    new = Nf4Linear(in_features=old.in_features, out_features=old.out_features, dtype=dtype)
    if old.bias is not None:
        new.bias = old.bias
    model.set_submodule(path, new)


def _check_names(model: Any, pack: Pack) -> None:
    """Every weight of the model is in the pack, with its shape, and nothing is left over."""
    stored: dict[str, tuple[int, ...]] = {}
    quantised: set[str] = set()
    for blob in pack.manifest.blobs:
        stored |= {entry.name: entry.shape for entry in blob.tensors if entry.name not in blob.nf4}
        quantised |= {*blob.nf4, *blob.constants}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if pack.manifest.model.tied:
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if module is head:
                wanted.pop(f"{name}.weight", None)
    for name, shape in wanted.items():
        if stored.get(name) != shape:
            found = stored.get(name, "nothing")
            raise PackError(f"{name}: config.json wants shape {shape}, the pack has {found}")
    for name in stored:
        if name not in wanted and name not in quantised:
            raise PackError(f"{name}: in the pack, but the model of config.json has no such weight")


def _take_end_tokens(model: Any, pack: Pack) -> None:
    """What begins, pads and ends a text by generation_config.json, where the pack has one.

    Chat models often name more ends there than config.json does (Phi-3: <|end|>), and transformers
    reads only the latter for a model without weights. How to sample is for whoever generates.
    """
    path = pack.path / "generation_config.json"
    if not path.is_file():
        return
    found = pack.json_object(path.name)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (ids := found.get(name)) in (None, []):
            continue
        several = name == "eos_token_id" and isinstance(ids, list)
        if not all(type(one) is int for one in (ids if several else [ids])):
            raise PackError(f"{path}: {name} is no token id: {ids!r}; convert again")
        setattr(model.generation_config, name, ids)
