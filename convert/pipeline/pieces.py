"""What the worker threads do: read a piece of a tensor and make of it what the pack stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from layerpack.convert.finite import all_finite
from layerpack.convert.gptq.encoder import CalibratedEncoder
from layerpack.convert.nf4.blocks import BlockEncoder
from layerpack.convert.pipeline.weights import Cut, WeightReader, raw_bytes
from layerpack.convert.plan.plan import Action, Item
from layerpack.convert.plan.storage import Storage
from layerpack.convert.source.protocol import Source
from layerpack.formats.blob import nf4
from layerpack.formats.blob.layout import Nf4Spec
from layerpack.formats.blob.nf4 import Nf4State
from layerpack.formats.errors import PackError, SourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes of the stored tensor `name`: all of them, or the next ones.

    `absmax` are those of the blocks of a piece just quantised. The part that holds a weight's state
    comes as `state`: its length is the layout's to say.
    """

    name: str
    data: bytes | bytearray | memoryview = b""
    absmax: torch.Tensor | None = None
    state: Nf4State | None = None


class PieceMaker:
    """Makes pieces of items, in any number of threads. Holds no tensor between two calls."""

    def __init__(
        self,
        source: Source,
        storage: Storage,
        *,
        block_size: int | None,
        device: torch.device,
        calibrated: CalibratedEncoder | None = None,
    ) -> None:
        self._calibrated = calibrated
        self._source, self._weights = source, WeightReader(source, storage, device=device)
        self._encoder: BlockEncoder | None = None
        if block_size is not None:
            self._encoder = BlockEncoder(block_size=block_size, device=device)

    def cuts(self, item: Item) -> Iterator[Cut]:
        """What to make pieces of, in file order. Touches no file."""
        if item.action is not Action.KEEP:
            yield from self._weights.cuts(item)
            return
        for part in item.part_names:
            length_bytes = self._source.tensors[_stored_name(item, part)].length_bytes
            yield Cut(
                item=item,
                part=part,
                source_bytes=length_bytes,
                memory_bytes=length_bytes,
                is_last=part == item.part_names[-1],
            )

    def make(self, cut: Cut) -> Piece:
        """Read and encode; waits. Raises SourceError, for values that are not finite among it."""
        if cut.part is not None:
            return self._kept(cut, cut.part)
        item = cut.item
        tensor = self._weights.read(cut)
        if item.same_as is not None:
            self._check_same(cut, item.same_as, tensor)
        absmax = None
        if item.action is Action.QUANTISE:
            if self._calibrated is not None and self._calibrated.knows(item.spec.name):
                codes, absmax = self._calibrated.encode(item.spec.name, tensor)
            else:
                assert self._encoder is not None
                codes, absmax = self._encoder.encode(tensor.reshape(-1))
            data, is_finite = raw_bytes(codes), all_finite(absmax)
        else:
            data, is_finite = raw_bytes(tensor), all_finite(tensor)
        if not is_finite:
            raise self._not_finite(cut)
        return Piece(name=item.spec.name, data=data, absmax=absmax)

    def _not_finite(self, cut: Cut) -> SourceError:
        """The checkpoint's fault, or of a type that its own values do not fit into."""
        item, exact = cut.item, self._weights.read(cut, dtype=torch.float64)
        if all_finite(exact):
            return SourceError(
                f"tensor {item.source} has values up to {exact.abs().max().item():.3g}, beyond "
                f"{item.dtype}, which config.json says that the model is in; set dtype to bfloat16 "
                "there, whose values go further"
            )
        return SourceError(
            f"tensor {item.source} holds NaN or infinite values, which cannot be converted; "
            "the checkpoint is damaged: download it again or mend it"
        )

    def _check_same(self, cut: Cut, copy: str, tensor: torch.Tensor) -> None:
        """transformers does not tie two weights that differ, whatever config.json says."""
        if not torch.equal(tensor, self._weights.read(cut, name=copy)):
            raise SourceError(
                f"tensors {cut.item.source} and {copy} differ, where config.json says that they "
                "are one; set tie_word_embeddings in it to false, or remove the wrong one"
            )

    def _kept(self, cut: Cut, part: str) -> Piece:
        """A part of a weight that is NF4 already; what decides how it is read back is checked."""
        item = cut.item
        tensor = self._source.read(_stored_name(item, part))
        data, state = raw_bytes(tensor), None
        if part.endswith(nf4.STATE):
            state, data = _kept_state(item, bytes(data)), memoryview(b"")
        elif part.endswith(nf4.QUANT_MAP) and not part.endswith(nf4.NESTED_QUANT_MAP):
            if tuple(tensor.flatten().tolist()) != nf4.NF4_CODES:
                raise SourceError(f"tensor {item.source}: its 16 values are not those of NF4")
        elif not all_finite(tensor):
            raise SourceError(f"tensor {item.source}: its scales are not finite")
        return Piece(name=part, data=data, state=state)


def _kept_state(item: Item, raw: bytes) -> Nf4State:
    spec = item.spec
    assert isinstance(spec, Nf4Spec)
    try:
        state = nf4.decode_state(raw, where=item.source)
    except PackError as reason:
        raise SourceError(str(reason)) from reason
    if (state.shape, state.block_size, state.double_quant) != (
        spec.shape,
        spec.block_size,
        spec.double_quant,
    ):
        raise SourceError(f"tensor {item.source}: its quantisation state does not fit its shape")
    return state


def _stored_name(item: Item, part: str) -> str:
    """The checkpoint's name of a stored part of an item."""
    return item.source + part.removeprefix(item.spec.name)
