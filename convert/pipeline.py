"""Blobs out of tensors: files are fetched, tensors read, quantised and written at the same time.

    fetch thread -> read thread -> (calling thread: quantise) -> write thread -> journal

Two short channels stand between them, so memory holds a few tensors, never a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from layerpack.convert.crew import Channel, Crew
from layerpack.convert.destination import Destination, sync_directory
from layerpack.convert.journal import BlobRecord, Journal
from layerpack.convert.plan import Action, BlobPlan, ConversionPlan, Item
from layerpack.convert.quantize import quantize_nf4
from layerpack.convert.shelf import Shelf
from layerpack.convert.source import Source
from layerpack.convert.weights import WeightReader, all_finite, raw_bytes
from layerpack.formats import nf4
from layerpack.formats.blob import BlobWriter
from layerpack.formats.errors import PackError, SourceError
from layerpack.formats.layout import Nf4Spec
from layerpack.formats.nf4 import Nf4State
from layerpack.formats.units import num_elements


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """What the reader hands on: a whole weight, a piece of one, or a part of one in NF4."""

    item: Item
    name: str
    tensor: torch.Tensor
    source_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """What the writer takes: a tensor's bytes, or the next of them, in file order.

    The part that holds a weight's state comes as `state`: its length is the layout's to say.
    """

    name: str
    data: bytes | bytearray | memoryview
    state: Nf4State | None = None


def run_pipeline(
    plan: ConversionPlan,
    blobs: Sequence[BlobPlan],
    source: Source,
    destination: Destination,
    journal: Journal,
    *,
    device: torch.device,
    undigested: Sequence[str],
    report: Callable[[int], None],
) -> None:
    """Convert `blobs`, in that order, and take the digests of the source files `undigested`.

    Waits until all is on the disk and in the journal. `report` takes the bytes fetched or read
    since last time, from any thread. Raises the first error of any stage, as it is.
    """
    uses = [blob.source_files for blob in blobs]
    with Crew() as crew:
        loaded: Channel[_Loaded] = Channel(crew, 1)
        encoded: Channel[_Encoded] = Channel(crew, 1)
        shelf = Shelf(
            crew, source, uses, undigested, report=report, note_digest=journal.source_digest
        )
        reader = _Reader(source, WeightReader(source, plan.storage), shelf, loaded)
        crew.start("fetch", shelf.fetch_all)
        crew.start("read", lambda: reader.read(blobs))
        level = None if plan.compression is None else plan.compression.level
        crew.start("write", lambda: _write(blobs, destination, encoded, journal, level))
        _encode(loaded, encoded, device, report)


class _Reader:
    """The read thread: waits for a blob's files, then loads its items in file order."""

    def __init__(
        self, source: Source, weights: WeightReader, shelf: Shelf, loaded: Channel[_Loaded]
    ) -> None:
        self._source, self._weights, self._shelf, self._loaded = source, weights, shelf, loaded

    def read(self, blobs: Sequence[BlobPlan]) -> None:
        for blob in blobs:
            self._shelf.need(blob.source_files)
            for item in blob.items:
                if item.action is Action.QUANTISE:
                    self._put(item, item.spec.name, self._weights.whole(item), item.source_bytes)
                elif item.action is Action.COPY:
                    self._copy(item)
                else:
                    self._keep(item)
            self._shelf.done(blob.source_files)
        self._loaded.close()

    def _copy(self, item: Item) -> None:
        elements, passed = num_elements(item.spec.shape), 0
        for piece in self._weights.pieces(item):
            before, passed = passed, passed + piece.numel()
            share = [item.source_bytes * count // max(1, elements) for count in (before, passed)]
            self._put(item, item.spec.name, piece, share[1] - share[0])

    def _keep(self, item: Item) -> None:
        for part in item.part_names:
            stored = item.source + part.removeprefix(item.spec.name)
            length_bytes = self._source.tensors[stored].length_bytes
            self._put(item, part, self._source.read(stored), length_bytes)

    def _put(self, item: Item, name: str, tensor: torch.Tensor, source_bytes: int) -> None:
        self._loaded.put(_Loaded(item=item, name=name, tensor=tensor, source_bytes=source_bytes))


def _encode(
    loaded: Channel[_Loaded],
    encoded: Channel[_Encoded],
    device: torch.device,
    report: Callable[[int], None],
) -> None:
    """The calling thread: quantise what is to be quantised, check what is only passed on."""
    for have in loaded:
        item, name = have.item, have.name
        if item.action is Action.QUANTISE:
            assert isinstance(item.spec, Nf4Spec)
            weight = quantize_nf4(
                have.tensor,
                name=name,
                block_size=item.spec.block_size,
                double_quant=item.spec.double_quant,
                device=device,
            )
            for part in item.part_names[:-1]:
                encoded.put(_Encoded(name=part, data=weight.part(part.removeprefix(name))))
            encoded.put(_Encoded(name=item.part_names[-1], data=b"", state=weight.state))
        elif item.action is Action.COPY:
            if not all_finite(have.tensor):
                raise SourceError(
                    f"tensor {item.source} has values that are not finite in {item.dtype}; "
                    "the checkpoint cannot be converted"
                )
            encoded.put(_Encoded(name=name, data=raw_bytes(have.tensor)))
        else:
            encoded.put(_kept(have))
        report(have.source_bytes)
    encoded.close()


def _kept(have: _Loaded) -> _Encoded:
    """A part of a weight that is NF4 already, checked as far as it decides how it is read back."""
    spec, name = have.item.spec, have.name
    assert isinstance(spec, Nf4Spec)
    data = raw_bytes(have.tensor)
    if name.endswith(nf4.STATE):
        try:
            state = nf4.decode_state(bytes(data), where=have.item.source)
        except PackError as reason:
            raise SourceError(str(reason)) from reason
        if (state.shape, state.block_size, state.double_quant) != (
            spec.shape,
            spec.block_size,
            spec.double_quant,
        ):
            raise SourceError(
                f"tensor {have.item.source}: its quantisation state does not fit its shape"
            )
        return _Encoded(name=name, data=b"", state=state)
    if name.endswith(nf4.QUANT_MAP) and not name.endswith(nf4.NESTED_QUANT_MAP):
        if tuple(have.tensor.flatten().tolist()) != nf4.NF4_CODES:
            raise SourceError(f"tensor {have.item.source}: its 16 values are not those of NF4")
    elif not all_finite(have.tensor):
        raise SourceError(f"tensor {have.item.source}: its scales are not finite")
    return _Encoded(name=name, data=data)


def _write(
    blobs: Sequence[BlobPlan],
    destination: Destination,
    encoded: Channel[_Encoded],
    journal: Journal,
    zstd_level: int | None,
) -> None:
    """The write thread: one blob after the other, each in the journal once it is on the disk."""
    arriving = iter(encoded)
    for blob in blobs:
        lengths = {entry.name: entry.length_bytes for entry in blob.layout.tensors}
        states: dict[str, Nf4State] = {}
        path = destination.pack / blob.file
        with BlobWriter(path, blob.layout, zstd_level=zstd_level) as writer:
            left_bytes = blob.layout.file_bytes - blob.layout.data_start_bytes
            while left_bytes:
                have = next(arriving)
                data = have.data
                if have.state is not None:
                    states[have.name.removesuffix(nf4.STATE)] = have.state
                    data = nf4.encode_state(have.state, lengths[have.name])
                writer.write(have.name, data)
                left_bytes -= memoryview(data).nbytes
        assert writer.digest is not None
        sync_directory(destination.pack)
        journal.blob(
            BlobRecord(file=blob.file, digest=writer.digest, states=states, frames=writer.frames)
        )
