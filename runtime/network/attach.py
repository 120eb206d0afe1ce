"""The store's slices as the weights of transformers' model: hooks that bring them in time."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layerpack.formats.errors import StreamError
from layerpack.formats.pack import Pack
from layerpack.libraries.transformers_api import swap_module
from layerpack.runtime.core.progress import PassProgress
from layerpack.runtime.core.slices import Kind, Slice
from layerpack.runtime.network.bind import (
    LayerBinder,
    PlaceViews,
    place_views,
    setter_of,
    view_tensor,
)
from layerpack.runtime.network.embedding import EmbeddingRows, embedding_matrix
from layerpack.runtime.network.head import SliceContext, SlicedHead
from layerpack.runtime.network.skeleton import decoder_layers
from layerpack.runtime.stream.mapped import advise_needed
from layerpack.runtime.stream.memory_tier import tensor_bytes
from layerpack.runtime.stream.store import Store
from layerpack.runtime.trace.trace import Trace

_READ_AHEAD_LAYERS = 2


def attach(
    network: Any,
    pack: Pack,
    store: Store,
    device: torch.device,
    trace: Trace,
    progress: PassProgress,
) -> None:
    """Give every module of the network its weights, now or in each pass. Raises StreamError."""
    layers = decoder_layers(network, pack.manifest.model.layers_path)
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(functools.partial(_reached, progress, number))
    _attach_layers(layers, pack, store, device, trace)
    attach_ends(network, pack, device, slices=store.plan.slices, use=store.use)


def _reached(progress: PassProgress, number: int, *_: Any) -> None:
    progress.done = number


def _attach_layers(
    layers: nn.ModuleList, pack: Pack, store: Store, device: torch.device, trace: Trace
) -> None:
    """Bind resident layers for good; let every other one bind and release in its turn."""
    moving: dict[tuple[int, Any], PlaceViews] = {}
    for part in store.plan.slices:
        if part.kind is not Kind.LAYER:
            continue
        blob = pack.manifest.layers[part.number]
        prefix = f"{pack.manifest.model.layers_path}.{part.number}."
        layer = layers[part.number]
        binder = LayerBinder(layer, blob, prefix=prefix, device=device)

        if part.index in store.resident:
            binder.bind(place_views(store.resident[part.index], blob, prefix=prefix))
            _attach_resident(layer, part, store, device, trace)
            continue
        # All layers of a model usually share one layout: as many sets of views as slots.
        for slot, storage in enumerate(store.slots):
            if (slot, binder.signature) not in moving:
                moving[slot, binder.signature] = place_views(storage, blob, prefix=prefix)
        _attach_moving(layer, part, store, binder, moving, trace)


def _attach_resident(
    layer: nn.Module, part: Slice, store: Store, device: torch.device, trace: Trace
) -> None:
    if device.type == "cpu":
        following = range(part.index + 1, part.index + 1 + _READ_AHEAD_LAYERS)
        ahead = [store.resident[index] for index in following if index in store.resident]

        def advise(*_: Any) -> None:
            for tensor in ahead:
                advise_needed(tensor)

        layer.register_forward_pre_hook(advise)
    layer.register_forward_pre_hook(lambda *_: store.check_resident(part.index))
    if trace.enabled:
        spans = store.resident_spans
        layer.register_forward_pre_hook(lambda *_: spans.begin(resident=True))
        layer.register_forward_hook(lambda *_: spans.end(part.title))


def _attach_moving(
    layer: nn.Module,
    part: Slice,
    store: Store,
    binder: LayerBinder,
    views: dict[tuple[int, Any], PlaceViews],
    trace: Trace,
) -> None:
    stream = store.stream
    if stream is None:
        raise StreamError("the model is closed; open it again")

    def bind(*_: Any) -> None:
        slot = stream.acquire(part.index)
        begin_s = time.perf_counter()
        binder.bind(views[slot, binder.signature])
        trace.bind(part.title, begin_s, time.perf_counter())
        stream.begin()

    binder.bind(views[0, binder.signature])
    layer.register_forward_pre_hook(bind)
    layer.register_forward_hook(lambda *_: stream.release())


def attach_ends(
    network: Any, pack: Pack, device: torch.device, *, slices: Sequence[Slice], use: SliceContext
) -> None:
    """Embedding rows, lm_head by its slices, and the few other weights outside the layers.

    `use` lends the bytes of one of `slices` on `device`, for as long as the network is in use.
    """
    model = pack.manifest.model
    EmbeddingRows(network.get_input_embeddings(), embedding_matrix(pack), device)
    for blob in (pack.manifest.embedding, pack.manifest.head):
        for entry in blob.tensors:
            if entry.name in (model.embedding, model.head) or entry.name in blob.constants:
                continue
            raw = tensor_bytes(pack, blob, entry)
            tensor = view_tensor(raw, entry, entry.offset_bytes).to(device, copy=True)
            owner, _, leaf = entry.name.rpartition(".")
            module = network.get_submodule(owner)
            setter_of(module, leaf)(module, leaf, tensor)
    old_head = network.get_output_embeddings()
    bias = getattr(old_head, "bias", None)
    head = SlicedHead(
        pack=pack,
        slices=[part for part in slices if part.kind is Kind.HEAD],
        use=use,
        bias=bias,
        device=device,
    )
    swap_module(network, old_head, head)
