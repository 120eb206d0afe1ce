"""Where each tensor of a blob will lie, decided from names and shapes before any byte is read.

The tensors of one quantised weight stand together, its state's JSON last and grown with spaces to
the next page, so every packed weight begins on a page with no padding tensors, which other loaders
warn about. Tensors that stay as they are follow at the end, widest elements first, so that each is
aligned to its element.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from layerpack.formats.blob import nf4
from layerpack.formats.blob.header import TensorEntry, header_bytes
from layerpack.formats.units import DTYPE_BYTES, PAGE_BYTES, align_up, num_elements


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainSpec:
    """A tensor stored as it is. `dtype` is a safetensors name (BF16, F32 …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Spec:
    """A weight stored in NF4. `name` ends in `.weight`; `shape` is (out_features, in_features)."""

    name: str
    shape: tuple[int, ...]
    block_size: int
    double_quant: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobLayout:
    """Entries in file order; `data_start_bytes` is the first of them, `file_bytes` the end."""

    tensors: tuple[TensorEntry, ...]
    data_start_bytes: int
    file_bytes: int


def layout_blob(specs: Sequence[PlainSpec | Nf4Spec]) -> BlobLayout:
    """Quantised weights in the given order (that of use), then the plain tensors, widest first."""
    quantised = [spec for spec in specs if isinstance(spec, Nf4Spec)]
    plain = [spec for spec in specs if isinstance(spec, PlainSpec)]
    plain.sort(key=lambda spec: -DTYPE_BYTES[spec.dtype])
    relative = list(_relative(quantised, plain))
    start = header_bytes(relative)
    entries = tuple(replace(e, offset_bytes=e.offset_bytes + start) for e in relative)
    end = entries[-1].end_bytes if entries else start
    return BlobLayout(tensors=entries, data_start_bytes=start, file_bytes=end)


def _relative(quantised: Sequence[Nf4Spec], plain: Sequence[PlainSpec]) -> Iterable[TensorEntry]:
    position = 0
    for weight in quantised:
        assert position % PAGE_BYTES == 0, "each weight must begin on a page"
        for name, dtype, part_shape in nf4.parts(
            weight.name,
            weight.shape,
            block_size=weight.block_size,
            double_quant=weight.double_quant,
        ):
            shape, length = part_shape, num_elements(part_shape) * DTYPE_BYTES[dtype]
            if name.endswith(nf4.STATE):
                length = align_up(position + length) - position
                shape = (length,)
            yield TensorEntry(
                name=name, dtype=dtype, shape=shape, offset_bytes=position, length_bytes=length
            )
            position += length
    for spec in plain:
        length = num_elements(spec.shape) * DTYPE_BYTES[spec.dtype]
        yield TensorEntry(
            name=spec.name,
            dtype=spec.dtype,
            shape=spec.shape,
            offset_bytes=position,
            length_bytes=length,
        )
        position += length
