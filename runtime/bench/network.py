"""transformers' own forward, fed by one of the loaders that `layerpack bench` compares with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from layerpack.formats.blob.header import TensorEntry
from layerpack.formats.manifest.facts import Blob
from layerpack.formats.pack import Pack
from layerpack.libraries.dtypes import TORCH_DTYPES
from layerpack.runtime.bench.loaders import Loader, open_loader
from layerpack.runtime.bench.rows import Method
from layerpack.runtime.core.slices import Kind, head_weight, pass_slices
from layerpack.runtime.network.attach import attach_ends
from layerpack.runtime.network.bind import LayerBinder, views_of
from layerpack.runtime.network.skeleton import build_skeleton, decoder_layers
from layerpack.runtime.stream.mapped import map_slice

_WHOLE_HEAD_BYTES = 1 << 60


@contextlib.contextmanager
def open_network(
    pack: Pack, method: Method, device: torch.device, *, num_layers: int, cold: bool
) -> Iterator[Any]:
    """The first `num_layers` layers of the model as a network whose layers come by `method`.

    Hooks and kernels are those of layerpack's own stream; only the way of the bytes differs.
    Closing joins all threads. Raises PackError, torch.OutOfMemoryError.
    """
    network = build_skeleton(pack, device=device, attention=method.attention)
    path = pack.manifest.model.layers_path
    layers = decoder_layers(network, path)
    del layers[num_layers:]
    paths = [pack.blob_path(blob) for blob in pack.manifest.layers[:num_layers]]
    head_blob, head, _ = head_weight(pack)
    if not method.head_resident:
        paths.append(pack.blob_path(head_blob))
    slices = pass_slices(pack, max_head_bytes=_WHOLE_HEAD_BYTES)
    with contextlib.ExitStack() as stack:
        # The network's hooks hold loader and tensors: they end with this block, whoever keeps it.
        resident: list[torch.Tensor] = []
        stack.callback(resident.clear)
        if method.head_resident:
            (whole,) = (part for part in slices if part.kind is Kind.HEAD)
            resident.append(map_slice(whole).to(device, copy=True))
        loader = open_loader(method, paths, device, cold=cold)
        stack.callback(loader.close)

        @contextlib.contextmanager
        def use(_index: int) -> Iterator[torch.Tensor]:
            if resident:
                yield resident[0]
            else:
                yield loader.load(num_layers)[head.name].reshape(-1).view(torch.uint8)

        attach_ends(network, pack, device, slices=slices, use=use)
        for number, layer in enumerate(layers):
            blob = pack.manifest.layers[number]
            _attach(layer, blob, f"{path}.{number}.", loader, number, device)
        yield network


def _attach(
    layer: nn.Module, blob: Blob, prefix: str, loader: Loader, place: int, device: torch.device
) -> None:
    binder = LayerBinder(layer, blob, prefix=prefix, device=device)

    def meta(entry: TensorEntry) -> torch.Tensor:
        return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype], device="meta")

    nothing = views_of(blob, meta, prefix=prefix)

    def before(*_: Any) -> None:
        tensors = loader.load(place)
        binder.bind(views_of(blob, lambda entry: tensors[entry.name], prefix=prefix))

    def after(*_: Any) -> None:
        binder.bind(nothing)  # and with that the layer's memory is free

    binder.bind(nothing)
    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
