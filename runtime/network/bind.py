"""From the bytes of a slot to the weights of a layer.

Views and quantisation states are made once for each place that bytes can be in (a device slot, a
resident tensor, a mapping); binding a layer to a place is then a handful of assignments. All
layers of a model usually share one layout, so there are as many sets of views as there are slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layerpack.formats.blob import nf4
from layerpack.formats.blob.header import TensorEntry
from layerpack.formats.manifest.facts import Blob
from layerpack.runtime.core.dtypes import TORCH_DTYPES
from layerpack.runtime.network.linear import Nf4Linear, bitsandbytes_functional


@dataclass(slots=True, kw_only=True)
class _Staged:
    """A constant at an odd address: copied to an aligned place before each use."""

    raw: torch.Tensor
    aligned: torch.Tensor

    def refresh(self) -> None:
        self.aligned.view(torch.uint8).copy_(self.raw)


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


def place_views(storage: torch.Tensor, blob: Blob, *, prefix: str, base_bytes: int) -> PlaceViews:
    """Views of all of `blob`'s tensors in `storage`; `prefix` (`model.layers.3.`) is taken off."""
    functional = bitsandbytes_functional()
    views = PlaceViews()
    entries = {entry.name: entry for entry in blob.tensors}
    constants = {name + suffix for name in blob.nf4 for suffix in nf4.SUFFIXES}

    def part(name: str) -> torch.Tensor:
        entry = entries[name]
        begin = entry.offset_bytes - base_bytes
        raw = storage[begin : begin + entry.length_bytes]
        if raw.data_ptr() % torch.empty((), dtype=TORCH_DTYPES[entry.dtype]).element_size():
            aligned = torch.empty(
                entry.shape, dtype=TORCH_DTYPES[entry.dtype], device=storage.device
            )
            views.staged.append(_Staged(raw=raw, aligned=aligned))
            return aligned
        return view_tensor(storage, entry, base_bytes)

    for name, entry in entries.items():
        relative = name.removeprefix(prefix)
        if state := blob.nf4.get(name):
            views.quantised[relative] = (
                part(name),
                make_state(functional, state, lambda suffix, name=name: part(name + suffix)),
            )
        elif name not in constants:
            views.plain[relative] = nn.Parameter(
                view_tensor(storage, entry, base_bytes), requires_grad=False
            )
    return views


def make_state(functional: Any, state: nf4.Nf4State, part: Any) -> Any:
    """bitsandbytes' QuantState over `part(suffix)` tensors; its `offset` is left to be set.

    Making that tensor on a CUDA device waits for the device, which is not for every bind.
    """
    nested = None
    if state.double_quant:
        nested = functional.QuantState(
            absmax=part(nf4.NESTED_ABSMAX),
            blocksize=nf4.NESTED_BLOCK_SIZE,
            code=part(nf4.NESTED_QUANT_MAP),
            dtype=torch.float32,
        )
    return functional.QuantState(
        absmax=part(nf4.ABSMAX),
        shape=torch.Size(state.shape),
        code=part(nf4.QUANT_MAP),
        blocksize=state.block_size,
        quant_type="nf4",
        dtype=TORCH_DTYPES[state.dtype],
        state2=nested,
    )


def offset_tensor(state: nf4.Nf4State, device: torch.device) -> torch.Tensor | None:
    """The mean that double quantisation took off the absmax: a float32 scalar, or None."""
    if state.nested_offset is None:
        return None
    return torch.tensor(state.nested_offset, dtype=torch.float32, device=device)


class LayerBinder:
    """The modules of one decoder layer, and how to point them at a place.

    `bind` writes to Python attributes only (and, for odd sizes, orders small copies on the
    current stream): no allocation, no host synchronisation.
    """

    def __init__(self, layer: nn.Module, blob: Blob, *, prefix: str, device: torch.device) -> None:
        self.signature = _signature(blob, prefix)
        self._plain: list[tuple[str, nn.Module, str]] = []
        self._linear: list[tuple[str, Nf4Linear, torch.Tensor | None]] = []
        constants = {name + suffix for name in blob.nf4 for suffix in nf4.SUFFIXES}
        for entry in blob.tensors:
            if entry.name in constants:
                continue
            relative = entry.name.removeprefix(prefix)
            owner, _, leaf = relative.rpartition(".")
            module = layer.get_submodule(owner)
            if state := blob.nf4.get(entry.name):
                assert isinstance(module, Nf4Linear)
                self._linear.append((relative, module, offset_tensor(state, device)))
            else:
                self._plain.append((relative, module, leaf))

    def bind(self, views: PlaceViews) -> None:
        """Point every module of the layer at `views`. Waits not."""
        for staged in views.staged:
            staged.refresh()
        for name, linear, offset in self._linear:
            linear.codes, state = views.quantised[name]
            state.offset = offset
            linear.state = state
        for name, module, leaf in self._plain:
            module._parameters[leaf] = views.plain[name]


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
