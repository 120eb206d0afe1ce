"""What a conversion will do: which tensor goes where and how. Plain data, made by planner.py."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from layerpack.convert.plan.storage import Storage
from layerpack.convert.plan.structure import Structure
from layerpack.formats.blob import nf4
from layerpack.formats.blob.layout import BlobLayout, Nf4Spec, PlainSpec
from layerpack.formats.manifest.facts import Compression, Quantization, Role
from layerpack.formats.units import num_elements


class Action(Enum):
    """What happens to a tensor on its way."""

    COPY = "copy"
    QUANTISE = "quantise"
    KEEP = "keep"
    """It is NF4 in the checkpoint already: its parts are taken over bit for bit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One parameter of a blob: `source` is its name in the checkpoint, `spec` how it is stored.

    `dtype` is the 16-bit type that it has for the model; `source_bytes` what is read for it.
    `same_as` is the checkpoint's copy of an embedding that is lm_head, too: to be equal to it.
    """

    action: Action
    source: str
    spec: PlainSpec | Nf4Spec
    dtype: str
    source_bytes: int
    same_as: str | None = None

    @property
    def part_names(self) -> tuple[str, ...]:
        """The stored tensors, in file order: one, or the parts of an NF4 weight, its state last."""
        spec = self.spec
        if isinstance(spec, PlainSpec):
            return (spec.name,)
        parts = nf4.parts(
            spec.name, spec.shape, block_size=spec.block_size, double_quant=spec.double_quant
        )
        return tuple(name for name, _, _ in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobPlan:
    """One blob to be written. `items` are in file order; `source_files` what they are read from."""

    role: Role
    layer: int | None
    file: str
    layout: BlobLayout
    items: tuple[Item, ...]
    source_files: tuple[str, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes read for this blob."""
        return sum(item.source_bytes for item in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """`blobs` in the order of use; `write_order` are indices into them, in that of the files.

    The layouts are those of the plain files; `compression` says what is done to them at the end.
    `notes` are for the user, a line each.
    """

    structure: Structure
    storage: Storage
    quantization: Quantization | None
    blobs: tuple[BlobPlan, ...]
    write_order: tuple[int, ...]
    compression: Compression | None = None
    notes: tuple[str, ...] = ()

    @property
    def pack_bytes(self) -> int:
        """Bytes of all blobs, uncompressed."""
        return sum(blob.layout.file_bytes for blob in self.blobs)

    @property
    def num_parameters(self) -> int:
        """Weights of the model; a tied one counts once."""
        return sum(num_elements(p.shape) for p in self.structure.parameters)
