"""Re-reading a whole pack: every file against what the manifest says of it.

Reads go past the page cache where the system allows it: what is checked is the disk, not a copy in
memory that was right when it was written.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from layerpack.formats.blob import nf4
from layerpack.formats.digest import Digest
from layerpack.formats.each_file import ProgressCallback, ReportBytes, for_each_file
from layerpack.formats.errors import PackError, StreamError
from layerpack.formats.machine_faults import raise_machine_fault
from layerpack.formats.manifest.document import parse_manifest
from layerpack.formats.manifest.facts import MANIFEST_NAME, Blob, FileEntry
from layerpack.formats.pack import Pack, manifest_bytes, raw_reader, stored_header
from layerpack.formats.read import BufferedReader, Reader, open_reader
from layerpack.formats.units import MIB, align_up

NEEDED_FILES = ("config.json", "model.safetensors.index.json")
"""What no pack is without, whether its manifest lists them or not."""
_THREADS, _PIECE_BYTES = 8, 16 * MIB
_SHOWN = 3


class How(str, Enum):
    """In what a file differs; of several, the first in this order is told."""

    MANIFEST = "manifest"
    MISSING = "missing"
    SIZE = "size"
    HEADER = "header"
    UNREADABLE = "unreadable"
    DIGEST = "digest"
    STATE = "state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One file that is not what it should be. `text` says what was wanted and what was found."""

    file: str
    how: How
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a look at every file found. `checked_bytes` are those that were to be read."""

    differences: tuple[Difference, ...]
    num_files: int
    checked_bytes: int


def verify_pack(
    path: Path | str, progress: ProgressCallback | None = None, *, direct: bool | None = None
) -> Verification:
    """Read and compare every file of the pack at `path`; all that differ are told, in file order.

    Where the manifest itself is damaged nothing else can be compared. `direct` forces reads past
    the page cache (True) or through it (False). Raises PackError if `path` is not a directory that
    has a manifest.
    """
    path = Path(path)
    raw = manifest_bytes(path)
    try:
        manifest = parse_manifest(raw)
    except PackError as error:
        raise_machine_fault(error)
        text = str(error).removeprefix(f"{MANIFEST_NAME}: ")
        broken = Difference(file=MANIFEST_NAME, how=How.MANIFEST, text=text)
        return Verification(differences=(broken,), num_files=1, checked_bytes=0)
    pack = Pack(path=path, manifest=manifest)
    unlisted = {*NEEDED_FILES} - {file.name for file in manifest.files}
    found: list[Difference | None] = [
        _absent(name) for name in sorted(unlisted) if not (path / name).is_file()
    ]
    # The largest first: at the end several threads have something to do.
    files: list[Blob | FileEntry] = sorted(
        (*manifest.blobs, *manifest.files), key=lambda file: -file.file_bytes
    )
    total_bytes = sum(file.file_bytes for file in files)
    reader = open_reader(path / MANIFEST_NAME, direct=direct)
    try:
        found += for_each_file(
            files,
            lambda file, report: check_file(pack, file, reader, report),
            num_threads=_THREADS,
            total_bytes=total_bytes,
            progress=progress,
        )
    finally:
        reader.close()
    differences = sorted(filter(None, found), key=lambda difference: difference.file)
    return Verification(
        differences=tuple(differences), num_files=len(files) + 1, checked_bytes=total_bytes
    )


def require_intact(path: Path | str, progress: ProgressCallback | None = None) -> None:
    """Raises PackError, naming the first few files, unless the whole pack is as it was written."""
    differences = verify_pack(path, progress).differences
    if differences:
        shown = "; ".join(f"{found.file} {found.text}" for found in differences[:_SHOWN])
        rest = len(differences) - _SHOWN
        raise PackError(f"{path}: {shown}" + (f"; and {rest} more files" if rest > 0 else ""))


def check_file(
    pack: Pack, file: Blob | FileEntry, reader: Reader, report: ReportBytes
) -> Difference | None:
    """One file against the manifest: size, header, digest, the states of its weights."""
    name = file.file if isinstance(file, Blob) else file.name
    path = pack.path / name
    try:
        found_bytes = path.stat().st_size
    except OSError as error:
        raise_machine_fault(error)
        report(file.file_bytes)
        return _absent(name)
    how, text = How.SIZE, f"has {found_bytes} of {file.file_bytes} bytes"
    if found_bytes == file.file_bytes:
        how, text = _content(pack, file, path, reader, report)
    else:
        report(file.file_bytes)
    return Difference(file=name, how=how, text=text) if text else None


def _absent(name: str) -> Difference:
    return Difference(file=name, how=How.MISSING, text="is missing")


def _content(
    pack: Pack, file: Blob | FileEntry, path: Path, reader: Reader, report: ReportBytes
) -> tuple[How, str]:
    """How a file of the right size differs; with an empty text if it does not."""
    try:
        same = _digest(path, file.file_bytes, reader, report) == file.digest
        if isinstance(file, Blob):
            if header := _header_text(path, file):
                return How.HEADER, header
            if same:
                return How.STATE, _state_text(pack, file)
    except StreamError as error:
        raise_machine_fault(error)
        return How.UNREADABLE, str(error).removeprefix(f"{path}: ")
    return How.DIGEST, "" if same else "has other content than was written (digest)"


def _digest(path: Path, file_bytes: int, reader: Reader, report: ReportBytes) -> str:
    digest = Digest()
    if not file_bytes:
        return digest.text
    # An anonymous mapping begins on a page, as direct reads need.
    buffer = memoryview(mmap.mmap(-1, min(_PIECE_BYTES, align_up(file_bytes))))
    for begin in range(0, file_bytes, _PIECE_BYTES):
        length = min(_PIECE_BYTES, file_bytes - begin)
        reader.read(path, begin, length, buffer)
        digest.update(buffer[:length])
        report(length)
    return digest.text


def _header_text(path: Path, blob: Blob) -> str:
    try:
        same = stored_header(path, blob.frames) == blob.tensors
    except PackError as error:
        raise_machine_fault(error)
        return f"has a broken header: {str(error).removeprefix(f'{path}: ')}"
    return "" if same else f"has another header than {MANIFEST_NAME} says"


def _state_text(pack: Pack, blob: Blob) -> str:
    """Whether the states in the blob are those that the manifest repeats."""
    reader = raw_reader(pack, BufferedReader())
    try:
        for name, state in blob.nf4.items():
            entry = blob.tensor(name + nf4.STATE)
            raw = bytearray(entry.length_bytes)
            reader.read(pack.blob_path(blob), entry.offset_bytes, len(raw), memoryview(raw))
            if nf4.decode_state(bytes(raw), where=entry.name) != state:
                return f"has another quantisation state of {name} than {MANIFEST_NAME} says"
    except PackError as error:
        raise_machine_fault(error)
        return str(error)
    finally:
        reader.close()
    return ""
