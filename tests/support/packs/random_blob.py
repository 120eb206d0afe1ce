"""One blob from the specs of its tensors, filled with noise, by the formats' own writer."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from layerpack.formats.blob import nf4
from layerpack.formats.blob.layout import Nf4Spec, PlainSpec, layout_blob
from layerpack.formats.blob_writer import BlobWriter
from layerpack.formats.manifest.facts import Blob, Role


def write_random_blob(
    path: Path, role: Role, layer: int | None, *specs: Nf4Spec | PlainSpec
) -> Blob:
    """What the manifest is to say of it. The same path and specs give the same bytes."""
    layout, chance = layout_blob(specs), random.Random(path.name)
    states = {spec.name: _state(spec) for spec in specs if isinstance(spec, Nf4Spec)}
    with BlobWriter(path, layout) as writer:
        for entry in layout.tensors:
            if entry.name.endswith(nf4.STATE):
                state = states[entry.name.removesuffix(nf4.STATE)]
                writer.write(entry.name, nf4.encode_state(state, entry.length_bytes))
            elif entry.dtype == "F32":
                values = [chance.random() for _ in range(entry.length_bytes // 4)]
                writer.write(entry.name, struct.pack(f"<{len(values)}f", *values))
            else:
                writer.write(entry.name, chance.randbytes(entry.length_bytes))
    assert writer.digest is not None
    return Blob(
        role=role,
        layer=layer,
        file=path.name,
        file_bytes=layout.file_bytes,
        digest=writer.digest,
        tensors=layout.tensors,
        nf4=states,
    )


def _state(spec: Nf4Spec) -> nf4.Nf4State:
    return nf4.Nf4State(
        shape=spec.shape,
        block_size=spec.block_size,
        dtype="BF16",
        nested_offset=0.625 if spec.double_quant else None,
    )
