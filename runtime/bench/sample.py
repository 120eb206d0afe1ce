"""The first layers of a pack as 16-bit files, for the rows that stream what was not quantised.

A pack holds NF4 only, so a few of its layers are decoded to the model's own 16-bit type and written
beside it: true shapes, true bytes, and the outputs can be held against those of the pack.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from layerpack.formats.blob.layout import BlobLayout, PlainSpec, layout_blob
from layerpack.formats.blob_writer import BlobWriter
from layerpack.formats.errors import DiskFullError
from layerpack.formats.manifest.facts import Blob
from layerpack.formats.pack import Pack
from layerpack.formats.units import human_bytes
from layerpack.libraries.bitsandbytes_api import dequantise, offset_tensor
from layerpack.runtime.network.bind import place_views
from layerpack.runtime.stream.mapped import map_bytes

_SPARE_BYTES = 1 << 30


def sixteen_bit_pack(pack: Pack, folder: Path, *, num_layers: int) -> Pack:
    """`pack` with 16-bit layers, of which the first `num_layers` are written to `folder`.

    The others are described only. Raises DiskFullError before anything is written, StreamError.
    """
    layouts = [_layout(blob) for blob in pack.manifest.layers]
    wanted = sum(layout.file_bytes for layout in layouts[:num_layers])
    free = shutil.disk_usage(folder).free
    if wanted + _SPARE_BYTES > free:
        raise DiskFullError(
            f"{folder}: {human_bytes(free)} free, but {num_layers} layers at 16 bits take "
            f"{human_bytes(wanted)} and a spare GB; free some space, or name fewer with --layers"
        )
    layers = []
    for number, (blob, layout) in enumerate(zip(pack.manifest.layers, layouts, strict=True)):
        # An absolute name: the pack's own directory stays that of the config and the other blobs.
        path = folder.absolute() / blob.file
        if number < num_layers:
            _write(pack, blob, layout, path)
        layers.append(
            replace(
                blob,
                file=str(path),
                file_bytes=layout.file_bytes,
                digest="",
                tensors=layout.tensors,
                nf4={},
            )
        )
    blobs = (pack.manifest.embedding, *layers, pack.manifest.head)
    return Pack(path=pack.path, manifest=replace(pack.manifest, blobs=blobs))


def _layout(blob: Blob) -> BlobLayout:
    return layout_blob(
        [
            PlainSpec(name=entry.name, dtype=state.dtype, shape=state.shape)
            if (state := blob.nf4.get(entry.name))
            else PlainSpec(name=entry.name, dtype=entry.dtype, shape=entry.shape)
            for entry in blob.tensors
            if entry.name not in blob.constants
        ]
    )


def _write(pack: Pack, blob: Blob, layout: BlobLayout, path: Path) -> None:
    base = blob.data_start_bytes
    storage = map_bytes(pack.blob_path(blob), base, blob.file_bytes - base)
    views = place_views(storage, blob, prefix="")
    for staged in views.staged:
        staged.refresh()
    with BlobWriter(path, layout, direct=False) as writer:
        for entry in layout.tensors:
            if state := blob.nf4.get(entry.name):
                codes, quantised = views.quantised[entry.name]
                quantised.offset = offset_tensor(state, codes.device)
                tensor = dequantise(codes, quantised)
            else:
                tensor = views.plain[entry.name].data
            writer.write(entry.name, memoryview(tensor.contiguous().view(torch.uint8).numpy().data))
