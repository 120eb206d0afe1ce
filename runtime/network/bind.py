"""From the bytes of a slot to the weights of a layer.

Views and quantisation states are made once for each place that bytes can be in (a device slot, a
resident tensor, a mapping); binding a layer to a place is then a handful of assignments. All
layers of a model usually share one layout, so there are as many sets of views as there are slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layerpack.formats.blob import nf4
from layerpack.formats.blob.header import TensorEntry
from layerpack.formats.manifest.facts import Blob
from layerpack.libraries.bitsandbytes_api import offset_tensor, quant_state
from layerpack.libraries.dtypes import TORCH_DTYPES
from layerpack.libraries.torch_api import buffers_of, set_buffer, set_parameter
from layerpack.runtime.network.linear import Nf4Linear


@dataclass(slots=True, kw_only=True)
class _Staged:
    """A tensor at an odd address: copied to an aligned place before each use."""

    raw: torch.Tensor
    aligned: torch.Tensor

    def refresh(self) -> None:
        self.aligned.view(torch.uint8).view(-1).copy_(self.raw)


@dataclass(slots=True, kw_only=True)
class PlaceViews:
    """One layout's tensors, seen in one place. Names are relative to the layer."""

    plain: dict[str, nn.Parameter] = field(default_factory=dict)
    quantised: dict[str, tuple[torch.Tensor, Any]] = field(default_factory=dict)
    staged: list[_Staged] = field(default_factory=list)


def view_tensor(storage: torch.Tensor, entry: TensorEntry, base_bytes: int) -> torch.Tensor:
    """The tensor `entry` inside `storage` (uint8), which begins at file offset `base_bytes`."""
    begin = entry.offset_bytes - base_bytes
    raw = storage[begin : begin + entry.length_bytes]
    return raw.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


def place_views(storage: torch.Tensor, blob: Blob, *, prefix: str) -> PlaceViews:
    """Views of all of `blob`'s tensors in `storage` (uint8), which holds its bytes but the header.

    `prefix` (`model.layers.3.`) is taken off their names.
    """
    staged: list[_Staged] = []

    def tensor_of(entry: TensorEntry) -> torch.Tensor:
        begin = entry.offset_bytes - blob.data_start_bytes
        raw = storage[begin : begin + entry.length_bytes]
        dtype = TORCH_DTYPES[entry.dtype]
        if raw.data_ptr() % dtype.itemsize == 0:
            return raw.view(dtype).view(entry.shape)
        aligned = torch.empty(entry.shape, dtype=dtype, device=storage.device)
        staged.append(_Staged(raw=raw, aligned=aligned))
        return aligned

    views = views_of(blob, tensor_of, prefix=prefix)
    views.staged = staged
    return views


def views_of(
    blob: Blob, tensor_of: Callable[[TensorEntry], torch.Tensor], *, prefix: str
) -> PlaceViews:
    """The same of tensors that may each have a place of their own."""
    views = PlaceViews()
    entries = {entry.name: entry for entry in blob.tensors}
    for name, entry in entries.items():
        relative = name.removeprefix(prefix)
        if state := blob.nf4.get(name):

            def constant(suffix: str, name: str = name) -> torch.Tensor:
                return tensor_of(entries[name + suffix])

            views.quantised[relative] = (tensor_of(entry), quant_state(state, constant))
        elif name not in blob.constants:
            views.plain[relative] = nn.Parameter(tensor_of(entry), requires_grad=False)
    return views


Setter = Callable[[nn.Module, str, torch.Tensor], None]


def setter_of(module: nn.Module, name: str) -> Setter:
    """What points the module's parameter, or stored buffer, `name` at a tensor."""
    return set_buffer if name in buffers_of(module) else set_parameter


class LayerBinder:
    """The modules of one decoder layer, and how to point them at a place.

    `bind` writes to Python attributes only (and, for odd sizes, orders small copies on the
    current stream): no allocation, no host synchronisation.
    """

    def __init__(self, layer: nn.Module, blob: Blob, *, prefix: str, device: torch.device) -> None:
        self.signature = _signature(blob, prefix)
        self._plain: list[tuple[str, Setter, nn.Module, str]] = []
        self._linear: list[tuple[str, Nf4Linear, torch.Tensor | None]] = []
        for entry in blob.tensors:
            if entry.name in blob.constants:
                continue
            relative = entry.name.removeprefix(prefix)
            owner, _, leaf = relative.rpartition(".")
            module = layer.get_submodule(owner)
            if state := blob.nf4.get(entry.name):
                assert isinstance(module, Nf4Linear)
                self._linear.append((relative, module, offset_tensor(state, device)))
            else:
                self._plain.append((relative, setter_of(module, leaf), module, leaf))

    def bind(self, views: PlaceViews) -> None:
        """Point every module of the layer at `views`. Waits not."""
        for staged in views.staged:
            staged.refresh()
        for name, linear, offset in self._linear:
            linear.codes, state = views.quantised[name]
            state.offset = offset
            linear.state = state
        for name, put, module, leaf in self._plain:
            put(module, leaf, views.plain[name])


def _signature(blob: Blob, prefix: str) -> tuple[Any, ...]:
    """Equal for layers whose tensors lie at the same places with the same meaning."""
    base = blob.data_start_bytes
    return tuple(
        (
            entry.name.removeprefix(prefix),
            entry.dtype,
            entry.shape,
            entry.offset_bytes - base,
            _state_signature(blob.nf4.get(entry.name)),
        )
        for entry in blob.tensors
    )


def _state_signature(state: nf4.Nf4State | None) -> tuple[Any, ...] | None:
    if state is None:
        return None
    return (state.shape, state.block_size, state.dtype, state.double_quant)
