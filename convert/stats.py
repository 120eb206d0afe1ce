"""How far a pack's weights are from those that it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from layerpack.convert.api import plan_source
from layerpack.convert.nf4.dequantize import Nf4Decoder
from layerpack.convert.open_source import open_source
from layerpack.convert.options import ConvertOptions
from layerpack.convert.pipeline.weights import WeightReader
from layerpack.convert.plan.plan import Action, ConversionPlan, Item
from layerpack.convert.source.protocol import Source
from layerpack.formats.blob import nf4
from layerpack.formats.errors import SourceError
from layerpack.formats.manifest import facts as formats
from layerpack.formats.manifest.facts import Blob
from layerpack.formats.pack import Pack, raw_reader
from layerpack.formats.read import BufferedReader, Reader
from layerpack.formats.summary import stored_as
from layerpack.libraries.dtypes import TORCH_DTYPES

_PIECE_ELEMENTS = 1 << 22

Report = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobError:
    """Relative Frobenius errors, |stored - source| / |source|: of a blob, and of its worst tensor.

    Tensors kept in 16 bits count, too; theirs is 0 if they are what the source has.
    """

    file: str
    error: float
    worst_tensor: str
    worst_error: float


def blob_errors(
    pack: Pack, source: str | None = None, report: Report = lambda _: None
) -> Iterator[BlobError]:
    """One after the other, each blob against the checkpoint that the pack was made from.

    `source` is a directory or a GGUF file; None: the one in the manifest, or the Hub's cache.
    `report` takes the parameters compared since last time. Raises SourceError if the source is not
    on this machine, or not of the same model, StreamError if the pack cannot be read.
    """
    name = source or _default_source(pack.manifest.source)
    path = Path(name).expanduser()
    if not path.exists():
        raise SourceError(f"{name}: not on this machine; name the checkpoint with --source")
    how = pack.manifest.quantization
    options = ConvertOptions(nf4=how is not None, nf4_head=how is not None and how.head)
    with open_source(name, options, scratch=path) as opened:
        plan = plan_source(opened, options)
        _check_same(pack, plan, name)
        with closing(raw_reader(pack, BufferedReader())) as reader:
            for blob, planned in zip(pack.manifest.blobs, plan.blobs, strict=True):
                for file in planned.source_files:
                    opened.fetch(file, lambda _: None)
                stored = _StoredTensors(reader, pack.blob_path(blob), blob)
                comparison = _Comparison(stored, opened, plan)
                yield comparison.run({item.spec.name: item for item in planned.items}, report)


def _default_source(source: formats.SourceRecord) -> str:
    if source.kind != "hub":
        return source.id
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source.id, "config.json", revision=source.revision)
    if not isinstance(config, str):
        raise SourceError(
            f"{source.id}: not in the local cache at the pack's revision; name a copy of the "
            "checkpoint with --source"
        )
    return str(Path(config).parent)


def _check_same(pack: Pack, plan: ConversionPlan, name: str) -> None:
    ours = [(blob.raw_file, set(stored_as(blob))) for blob in pack.manifest.blobs]
    theirs = [(blob.file, {item.spec.name for item in blob.items}) for blob in plan.blobs]
    if ours != theirs:
        raise SourceError(f"{name}: not the model that {pack.path} was made from; use --source")
    shapes = {item.spec.name: item.spec.shape for blob in plan.blobs for item in blob.items}
    for blob in pack.manifest.blobs:
        for weight in stored_as(blob):
            state = blob.nf4.get(weight)
            shape = state.shape if state else blob.tensor(weight).shape
            if shape != shapes[weight]:
                raise SourceError(
                    f"{name}: {weight} has the shape {list(shapes[weight])}, in {pack.path} "
                    f"{list(shape)}; name the right checkpoint with --source"
                )


@dataclass(frozen=True, slots=True)
class _StoredTensors:
    """The tensors of one blob of the pack, plain or compressed."""

    reader: Reader
    path: Path
    blob: Blob

    def read(self, name: str) -> torch.Tensor:
        """All of it. Raises StreamError."""
        entry = self.blob.tensor(name)
        tensor = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        raw = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self.reader.read(self.path, entry.offset_bytes, entry.length_bytes, raw)
        return tensor


class _Comparison:
    """One blob's tensors, read piece by piece from the pack and from the source."""

    def __init__(self, stored: _StoredTensors, source: Source, plan: ConversionPlan) -> None:
        self._have, self._source = stored, source
        self._weights = WeightReader(source, plan.storage)

    def run(self, items: dict[str, Item], report: Report) -> BlobError:
        """Waits until all is compared."""
        total, worst = [0.0, 0.0], ("", -1.0)
        for name in stored_as(self._have.blob):
            off, norm = self._compare(name, items[name], report)
            total = [total[0] + off, total[1] + norm]
            worst = max(worst, (name, _relative(off, norm)), key=lambda pair: pair[1])
        return BlobError(
            file=self._have.blob.file,
            error=_relative(*total),
            worst_tensor=worst[0],
            worst_error=worst[1],
        )

    def _compare(self, name: str, item: Item, report: Report) -> tuple[float, float]:
        """Sums of squares: of the difference, and of the source's weight."""
        stored = self._stored(name)
        off = norm = 0.0
        position = 0
        for piece in self._wanted(item):
            wanted = piece.reshape(-1)
            have = stored(position, position + wanted.numel())
            position += wanted.numel()
            off += _square_sum(have.double() - wanted.double())
            norm += _square_sum(wanted.double())
            report(wanted.numel())
        return off, norm

    def _stored(self, name: str) -> Callable[[int, int], torch.Tensor]:
        state = self._have.blob.nf4.get(name)
        if state is not None:
            return Nf4Decoder(state, lambda suffix: self._have.read(name + suffix)).elements
        whole = self._have.read(name).reshape(-1)
        return lambda begin, end: whole[begin:end]

    def _wanted(self, item: Item) -> Iterator[torch.Tensor]:
        if item.action is not Action.KEEP:
            for cut in self._weights.cuts(item):
                yield self._weights.read(cut)
            return
        raw = self._source.read(item.source + nf4.STATE).numpy().tobytes()
        state = nf4.decode_state(raw, where=item.source)
        decoder = Nf4Decoder(state, lambda suffix: self._source.read(item.source + suffix))
        count = math.prod(item.spec.shape)
        for begin in range(0, count, _PIECE_ELEMENTS):
            yield decoder.elements(begin, min(begin + _PIECE_ELEMENTS, count))


def _square_sum(values: torch.Tensor) -> float:
    return float((values * values).sum())


def _relative(off: float, norm: float) -> float:
    """Of an all-zero tensor the error itself, as there is nothing to relate it to."""
    return math.sqrt(off / norm) if norm else math.sqrt(off)
