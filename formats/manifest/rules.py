"""What a manifest must fulfil beyond the types of its fields. Pure: no file is touched."""

from __future__ import annotations

import re
from collections.abc import Iterator

from layerpack.formats.blob import nf4
from layerpack.formats.blob.header import TensorEntry
from layerpack.formats.digest import is_digest
from layerpack.formats.frames.table import FRAMES_SUFFIX
from layerpack.formats.manifest.facts import MANIFEST_NAME, Blob, FileEntry, Manifest, Role
from layerpack.formats.units import DTYPE_BYTES, PAGE_BYTES, num_elements

_PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors(\.zst)?")
_LOAD_DTYPES = ("BF16", "F16", "F32")
STORED_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""What a tensor of a pack may be: a reader needs no others."""


def manifest_problems(manifest: Manifest) -> list[str]:
    """Every rule of docs/format.md that the manifest breaks, one short sentence each."""
    problems = [problem for blob in manifest.blobs for problem in _blob_problems(blob)]
    problems += _order_problems(manifest)
    problems += [problem for file in manifest.files for problem in _file_problems(file)]
    for blob in manifest.blobs:
        framed = manifest.compression is not None and blob.role is not Role.EMBEDDING
        if (blob.frames is not None) != framed:
            problems.append(f"{blob.file}: frames, or none, against features")
    files = [blob.file for blob in manifest.blobs] + [file.name for file in manifest.files]
    names = [entry.name for blob in manifest.blobs for entry in blob.tensors]
    problems += [f"{file} is listed twice" for file in _repeated(files)]
    problems += [f"tensor {name} is listed twice" for name in _repeated(names)]
    how = manifest.quantization
    if how is not None and how.block_size not in nf4.BLOCK_SIZES:
        problems.append(f"block size {how.block_size} is not supported")
    if manifest.model.dtype not in _LOAD_DTYPES:
        problems.append(f"model dtype {manifest.model.dtype} is not one of {_LOAD_DTYPES}")
    if not problems:  # what follows takes blobs and tensors to be where they belong
        problems += [*_model_problems(manifest), *_quantization_problems(manifest)]
    return problems


def _model_problems(manifest: Manifest) -> Iterator[str]:
    """Embedding, head and layers, as the model names them."""
    model = manifest.model
    embedding = _entry(manifest.embedding, model.embedding)
    if embedding is None:
        yield f"tensor {model.embedding}, named under model, is not in {manifest.embedding.file}"
    elif embedding.dtype not in _LOAD_DTYPES or not _is_matrix(embedding.shape):
        yield f"{manifest.embedding.file}: {embedding.name} is not a matrix of 16 or 32 bits"
    if not model.tied:
        head, state = _entry(manifest.head, model.head), manifest.head.nf4.get(model.head)
        if head is None:
            yield f"tensor {model.head}, named under model, is not in {manifest.head.file}"
        elif not _is_matrix(state.shape if state else head.shape):
            yield f"{manifest.head.file}: {head.name} is not a matrix"
        elif state is None and head.dtype not in _LOAD_DTYPES:
            yield f"{manifest.head.file}: {head.name} is not a matrix of 16 or 32 bits"
    for blob in manifest.layers:
        prefix = f"{model.layers_path}.{blob.layer}."
        for entry in blob.tensors:
            if not entry.name.startswith(prefix):
                yield f"{blob.file}: {entry.name} does not begin with {prefix}"


def _quantization_problems(manifest: Manifest) -> Iterator[str]:
    """Each weight's own state against what is said of all of them."""
    said = manifest.quantization
    for blob in manifest.blobs:
        for name, state in blob.nf4.items():
            if said is None or (state.block_size, state.double_quant) != (
                said.block_size,
                said.double_quant,
            ):
                yield f"{blob.file}: {name} is not quantised as quantization says"
    if said is not None and said.head != (manifest.model.head in manifest.head.nf4):
        yield f"quantization.head is {str(said.head).lower()}, the head's blob says otherwise"


def _entry(blob: Blob, name: str) -> TensorEntry | None:
    return next((entry for entry in blob.tensors if entry.name == name), None)


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and all(shape)


def _order_problems(manifest: Manifest) -> Iterator[str]:
    found = [(blob.role, blob.layer) for blob in manifest.blobs]
    if len(found) != manifest.model.num_layers + 2 or not manifest.model.num_layers:
        yield f"{len(found)} blobs for {manifest.model.num_layers} layers, embedding and head"
        return
    wanted: list[tuple[Role, int | None]] = [(Role.EMBEDDING, None)]
    wanted += [(Role.LAYER, index) for index in range(manifest.model.num_layers)]
    wanted += [(Role.HEAD, None)]
    for place, (have, want) in enumerate(zip(found, wanted, strict=True)):
        if have != want:
            yield f"blobs[{place}] should be {_title(*want)} but is {_title(*have)}"
            return


def _title(role: Role, layer: int | None) -> str:
    return role.value if layer is None else f"{role.value} {layer}"


def _file_problems(file: FileEntry) -> Iterator[str]:
    plain = file.name.isprintable() and not set(file.name) & set("/\\")
    if not plain or file.name in (".", "..", MANIFEST_NAME):
        yield f"file name {file.name!r} is not a plain name inside the pack"
    if not is_digest(file.digest):
        yield f"{file.name}: digest {file.digest[:60]!r} is not an xxh3_128 digest"


def _blob_problems(blob: Blob) -> Iterator[str]:
    if not _PLAIN_FILE_NAME.fullmatch(blob.file):
        yield f"file name {blob.file!r} is not a plain .safetensors name inside the pack"
        return
    yield from _frames_problems(blob)
    if not is_digest(blob.digest):
        yield f"{blob.file}: digest {blob.digest[:60]!r} is not an xxh3_128 digest"
    if not blob.tensors:
        yield f"{blob.file} lists no tensors"
        return
    position = blob.tensors[0].offset_bytes
    if position % PAGE_BYTES or position < PAGE_BYTES:
        yield f"{blob.file}: data begin at byte {position}, not at a multiple of {PAGE_BYTES}"
    for entry in blob.tensors:
        if entry.dtype not in STORED_DTYPES:
            yield f"{blob.file}: {entry.name} has dtype {entry.dtype!r}, which is not known"
            return
        if entry.length_bytes != num_elements(entry.shape) * DTYPE_BYTES[entry.dtype]:
            yield f"{blob.file}: {entry.name} has {entry.length_bytes} bytes, not its shape's"
        if entry.offset_bytes < position:
            yield f"{blob.file}: {entry.name} overlaps the tensor before it"
        elif entry.offset_bytes > position:
            yield f"{blob.file}: hole before {entry.name}"
        position = entry.end_bytes
    if position > blob.raw_bytes:
        yield f"{blob.file}: tensors end at byte {position}, outside its {blob.raw_bytes} bytes"
    elif position < blob.raw_bytes:
        yield f"{blob.file}: {blob.raw_bytes - position} bytes after the last tensor"
    yield from _nf4_problems(blob)
    yield from _alignment_problems(blob)


def _frames_problems(blob: Blob) -> Iterator[str]:
    if blob.file.endswith(FRAMES_SUFFIX) != (blob.frames is not None):
        yield f"{blob.file}: file name and frames do not fit"
    if blob.frames is not None and blob.frames.file_bytes != blob.file_bytes:
        yield f"{blob.file}: frames end at {blob.frames.file_bytes}, not at {blob.file_bytes}"


def _nf4_problems(blob: Blob) -> Iterator[str]:
    by_name = {entry.name: entry for entry in blob.tensors}
    expected: set[str] = set()
    for name, state in blob.nf4.items():
        if state.block_size not in nf4.BLOCK_SIZES or state.dtype not in _LOAD_DTYPES:
            yield f"{blob.file}: {name} has an unknown block size or dtype"
            return
        if not _is_matrix(state.shape):
            yield f"{blob.file}: {name} is not a matrix"
            return
        for part, dtype, shape in nf4.parts(
            name, state.shape, block_size=state.block_size, double_quant=state.double_quant
        ):
            expected.add(part)
            entry = by_name.get(part)
            if entry is None:
                yield f"{blob.file}: {part} is missing"
            elif part.endswith(nf4.STATE):
                if entry.dtype != "U8" or entry.length_bytes < nf4.STATE_RESERVED_BYTES // 2:
                    yield f"{blob.file}: {part} has the wrong dtype or shape"
            elif (entry.dtype, entry.shape) != (dtype, shape):
                yield (
                    f"{blob.file}: {part} is {entry.dtype} {list(entry.shape)}, "
                    f"should be {dtype} {list(shape)}"
                )
    for name in by_name:
        if name.endswith(nf4.SUFFIXES) and name not in expected:
            yield f"{blob.file}: {name} belongs to no quantised weight"


def _alignment_problems(blob: Blob) -> Iterator[str]:
    for entry in blob.tensors:
        if entry.name in blob.nf4:
            alignment = PAGE_BYTES
        elif entry.name in blob.constants:
            continue  # an odd number of codes puts its constants at odd offsets
        else:
            alignment = DTYPE_BYTES[entry.dtype]
        if entry.offset_bytes % alignment:
            yield f"{blob.file}: {entry.name} is misaligned (byte {entry.offset_bytes})"


def _repeated(values: list[str]) -> list[str]:
    seen: set[str] = set()
    return [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]
