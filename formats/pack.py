"""Opening a pack directory: the manifest, and that the files are there as it says."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerpack.formats import lfs
from layerpack.formats.blob.header import TensorEntry, parse_header, read_header
from layerpack.formats.calibration.record import RECORD_NAME
from layerpack.formats.errors import PackError
from layerpack.formats.frames.coding import FrameDecoder
from layerpack.formats.frames.reader import FrameReader
from layerpack.formats.frames.table import FrameTable
from layerpack.formats.jsontext import parse_json
from layerpack.formats.manifest.document import parse_manifest
from layerpack.formats.manifest.facts import MANIFEST_NAME, UNFINISHED_SUFFIX, Blob, Manifest
from layerpack.formats.read import Reader
from layerpack.formats.text import without_path
from layerpack.formats.units import human_bytes

MAX_MANIFEST_BYTES = 1_000_000_000
"""Far beyond any model's: 80 layers of seven weights take 0.8 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A pack on disk whose manifest is valid and whose files have the stated sizes."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str) -> Pack:
        """Read and check the manifest, each blob's size and header. Raises PackError.

        Contents are not read: digests are what `layerpack verify` is for.
        """
        path = Path(path)
        pack = cls(path=path, manifest=read_manifest(path))
        for blob in pack.manifest.blobs:
            pack.check_file(blob)
        return pack

    def json_object(self, name: str) -> dict[str, Any]:
        """What the pack's file `name` holds. Raises PackError if that is no JSON object."""
        path = self.path / name
        try:
            found = parse_json(path.read_bytes())
        except (OSError, ValueError) as reason:
            raise PackError(
                f"{path}: not usable ({without_path(reason, path)}); convert again"
            ) from reason
        if not isinstance(found, dict):
            raise PackError(f"{path}: not a JSON object; convert again")
        return found

    def blob_path(self, blob: Blob) -> Path:
        """Where the blob's file is. The name was checked to be a plain one."""
        return self.path / blob.file

    def check_file(self, blob: Blob) -> None:
        """Size and safetensors header of one blob against the manifest. Raises PackError."""
        path = self.blob_path(blob)
        try:
            found_bytes = path.stat().st_size
        except OSError as reason:
            raise PackError(
                f"{path}: listed in {MANIFEST_NAME} but cannot be read ({reason.strerror}); "
                "restore it or convert again"
            ) from reason
        if found_bytes != blob.file_bytes:
            if lfs.is_pointer_file(path):
                raise PackError(f"{path}: {lfs.REMEDY}")
            raise PackError(
                f"{path} has {found_bytes} of {blob.file_bytes} bytes; restore it or convert again"
            )
        if stored_header(path, blob.frames) != blob.tensors:
            raise PackError(f"{path}: its header differs from {MANIFEST_NAME}; convert again")


def stored_header(path: Path, table: FrameTable | None) -> tuple[TensorEntry, ...]:
    """The safetensors header of a blob, plain or compressed. Raises PackError."""
    if table is None:
        return read_header(path)
    frame = table.frames[0]
    raw = bytearray(frame.raw_bytes)
    try:
        with open(path, "rb", buffering=0) as file:
            stored = memoryview(file.read(frame.stored_bytes))
    except OSError as reason:
        raise PackError(f"{path}: cannot be read ({reason.strerror})") from reason
    try:
        FrameDecoder().decode(stored, frame.coding, memoryview(raw))
    except PackError as error:
        raise PackError(f"{path}: its first frame {error}") from error
    return parse_header(bytes(raw), file_bytes=table.raw_bytes, where=str(path))


def raw_reader(pack: Pack, inner: Reader) -> Reader:
    """What reads raw bytes of the pack's blobs: `inner` itself where nothing is compressed."""
    tables = {
        pack.blob_path(blob): blob.frames for blob in pack.manifest.blobs if blob.frames is not None
    }
    return FrameReader(inner, tables) if tables else inner


def read_manifest(path: Path) -> Manifest:
    """The manifest of the pack directory `path`. Raises PackError."""
    return parse_manifest(manifest_bytes(path), where=str(path / MANIFEST_NAME))


def manifest_bytes(path: Path) -> bytes:
    """The manifest of the pack directory `path`, as it is. Raises PackError if it has none."""
    file = path / MANIFEST_NAME
    if not path.is_dir():
        _refuse_unfinished(path)
        raise PackError(f"{path}: no such directory; name one that `layerpack convert` wrote")
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_MANIFEST_BYTES:
            raise PackError(
                f"{file}: not a file of at most {human_bytes(MAX_MANIFEST_BYTES)}, so no manifest"
            )
        return file.read_bytes()
    except FileNotFoundError:
        _refuse_unfinished(path)
        if (path / RECORD_NAME).is_file():
            raise PackError(
                f"{path}: a calibration, not a pack; it is for `layerpack convert --calibration`"
            ) from None
        raise PackError(
            f"{path}: no {MANIFEST_NAME} in it, so not a pack; make one with `layerpack convert`"
        ) from None
    except OSError as reason:
        raise PackError(f"{file}: cannot be read ({reason.strerror})") from reason


def _refuse_unfinished(path: Path) -> None:
    """Raises PackError if there is no pack at `path` because it is still being made."""
    if os.path.isdir(os.path.abspath(path) + UNFINISHED_SUFFIX):
        raise PackError(
            f"{path}: its conversion is not finished; run the same `layerpack convert` command "
            "again (`layerpack inspect` shows how far it is)"
        ) from None
