"""Blobs out of tensors: files are fetched, pieces read, encoded and written at the same time.

    fetch thread -> worker threads: read, encode -> assemble thread -> write thread -> journal

A worker takes a piece from the file to the pack's bytes while a core's cache holds it. Pieces are
put together in the order of the pack, so threads cannot change a byte. Few of them are
under way at a time: memory holds some pieces, never a tensor. The calling thread only waits: Ctrl-C
is raised there, and could leave a lock taken for ever if that thread used any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import torch

from layerpack.convert.gptq.encoder import CalibratedEncoder
from layerpack.convert.nf4.blocks import useful_workers
from layerpack.convert.nf4.quantize import finish_nf4
from layerpack.convert.nf4.torch_threads import one_torch_thread
from layerpack.convert.output.destination import Destination
from layerpack.convert.output.journal import BlobRecord, Journal
from layerpack.convert.pipeline.crew import Channel, Crew
from layerpack.convert.pipeline.pieces import Piece, PieceMaker
from layerpack.convert.pipeline.shelf import Shelf
from layerpack.convert.pipeline.weights import Cut
from layerpack.convert.plan.plan import Action, BlobPlan, ConversionPlan, Item
from layerpack.convert.source.protocol import Source
from layerpack.formats.blob import nf4
from layerpack.formats.blob.layout import Nf4Spec
from layerpack.formats.blob.nf4 import Nf4State
from layerpack.formats.blob_writer import BlobWriter
from layerpack.formats.disk import sync_directory
from layerpack.formats.frames.table import FRAMES_SUFFIX

_PIECES_AHEAD = 4  # of the writer, while a weight's absmax are quantised
_MAX_BYTES = 2 << 30
"""Memory of pieces under way: reached only where tensors cannot be cut (GGUF)."""


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
    calibrated: CalibratedEncoder | None = None,
) -> None:
    """Convert `blobs`, in that order, and take the digests of the source files `undigested`.

    Waits until all is on the disk and in the journal. `report` takes the bytes fetched or read
    since last time, from any thread. Raises the first error of any stage, as it is.
    """
    uses = [blob.source_files for blob in blobs]
    block_size = None if plan.quantization is None else plan.quantization.block_size
    maker = PieceMaker(
        source, plan.storage, block_size=block_size, device=device, calibrated=calibrated
    )
    level = None if plan.compression is None else plan.compression.level
    with one_torch_thread(), Crew() as crew:
        ready: Channel[Piece] = Channel(crew, _PIECES_AHEAD)
        shelf = Shelf(
            crew, source, uses, undigested, report=report, note_digest=journal.source_digest
        )

        def assemble() -> None:
            pool = ThreadPoolExecutor(num_workers := useful_workers(device), "layerpack-work")
            try:
                made = _make(blobs, shelf, maker, pool, most=2 * num_workers + 2)
                _assemble(blobs, made, ready, shelf, report)
            finally:
                pool.shutdown(cancel_futures=True)

        crew.start("fetch", shelf.fetch_all)
        crew.start("write", lambda: _write(blobs, destination, ready, journal, level))
        crew.start("assemble", assemble)


def _make(
    blobs: Sequence[BlobPlan],
    shelf: Shelf,
    maker: PieceMaker,
    pool: ThreadPoolExecutor,
    *,
    most: int,
) -> Iterator[tuple[Cut, Piece]]:
    """All pieces in order, made by the pool: `most` under way, the one just taken among them."""
    under_way: deque[tuple[Cut, Future[Piece]]] = deque()

    def has_room(cut: Cut) -> bool:
        taken_bytes = sum(cut.memory_bytes for cut, _ in under_way)
        return len(under_way) < most and taken_bytes + cut.memory_bytes <= _MAX_BYTES

    for blob in blobs:
        for cut in chain.from_iterable(map(maker.cuts, blob.items)):
            while under_way and not (shelf.has(blob.source_files) and has_room(cut)):
                yield under_way[0][0], under_way[0][1].result()
                under_way.popleft()
            shelf.need(blob.source_files)
            under_way.append((cut, pool.submit(maker.make, cut)))
    while under_way:
        yield under_way[0][0], under_way[0][1].result()
        under_way.popleft()


def _assemble(
    blobs: Sequence[BlobPlan],
    made: Iterator[tuple[Cut, Piece]],
    ready: Channel[Piece],
    shelf: Shelf,
    report: Callable[[int], None],
) -> None:
    """The assemble thread: pieces to the writer, and what only a whole weight's absmax can tell."""
    for blob in blobs:
        for item in blob.items:
            absmax = []
            for cut, piece in made:
                ready.put(piece)
                report(cut.source_bytes)
                if piece.absmax is not None:
                    absmax.append(piece.absmax)
                if cut.is_last:
                    break
            if item.action is Action.QUANTISE:
                for part in _finished(item, torch.cat(absmax)):
                    ready.put(part)
        shelf.done(blob.source_files)
    ready.close()


def _finished(item: Item, absmax: torch.Tensor) -> Iterator[Piece]:
    """The parts of a quantised weight that follow its codes."""
    spec = item.spec
    assert isinstance(spec, Nf4Spec)
    weight = finish_nf4(
        absmax,
        shape=spec.shape,
        dtype=item.dtype,
        block_size=spec.block_size,
        double_quant=spec.double_quant,
    )
    for part in item.part_names[1:-1]:
        yield Piece(name=part, data=weight.part(part.removeprefix(spec.name)))
    yield Piece(name=item.part_names[-1], state=weight.state)


def _write(
    blobs: Sequence[BlobPlan],
    destination: Destination,
    ready: Channel[Piece],
    journal: Journal,
    zstd_level: int | None,
) -> None:
    """The write thread: one blob after the other, each in the journal once it is on the disk."""
    arriving = iter(ready)
    for blob in blobs:
        lengths = {entry.name: entry.length_bytes for entry in blob.layout.tensors}
        states: dict[str, Nf4State] = {}
        path = destination.pack / blob.file
        level = zstd_level if blob.file.endswith(FRAMES_SUFFIX) else None
        with BlobWriter(path, blob.layout, zstd_level=level) as writer:
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
