"""A compressed pack to the plain one that it was made from, bit for bit. Needs no torch."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from layerpack.convert.output.destination import Destination
from layerpack.formats.digest import Digest, bytes_digest
from layerpack.formats.disk import is_full
from layerpack.formats.each_file import ProgressCallback, ReportBytes, for_each_file
from layerpack.formats.errors import PackError, StreamError, TargetError
from layerpack.formats.frames.table import FrameTable
from layerpack.formats.manifest.document import dump_manifest
from layerpack.formats.manifest.facts import MANIFEST_NAME, Blob, Manifest
from layerpack.formats.pack import Pack, raw_reader
from layerpack.formats.read import Reader, open_reader
from layerpack.formats.units import MIB, align_up
from layerpack.formats.write import open_output

_PIECE_BYTES = 16 * MIB


def unpack(
    path: Path | str,
    out: Path | str,
    progress: ProgressCallback | None = None,
    *,
    force: bool = False,
) -> Manifest:
    """Expand the compressed pack at `path` to a plain one at `out`; its manifest.

    Every file is that of the same conversion without compression, which is checked by its digest.
    Nothing appears under `out` unless it is whole, and a break leaves nothing. `force` replaces
    the pack that stands there, be it the compressed one itself. Raises PackError, TargetError
    (DiskFullError).
    """
    pack = Pack.open(path)
    if pack.manifest.compression is None:
        raise PackError(f"{path}: is not compressed; use it as it is")
    destination = Destination(out)
    destination.check_target(force=force)
    plain = _plain(pack.manifest)
    with destination.held():
        if destination.journal.exists():
            raise TargetError(
                f"{destination.partial}: holds an unfinished conversion; finish that one, "
                "name another target or remove the directory"
            )
        destination.discard()  # what a killed run left
        index = dump_manifest(plain)
        small_bytes = sum(file.file_bytes for file in plain.files) + len(index)
        pack_bytes = plain.total_bytes + small_bytes
        destination.check_space(pack_bytes=pack_bytes)
        try:
            _copy_small_files(pack, destination)
            _expand_blobs(pack, destination, progress)
            destination.write_file(MANIFEST_NAME, index)
            destination.commit(force=force)
        except OSError as reason:
            if is_full(reason):
                destination.discard()  # so that what is free then is what another run finds
                raise destination.disk_full(pack_bytes, resumes=False) from reason
            raise TargetError(
                f"{reason.filename or destination.partial}: {reason.strerror}"
            ) from reason
    return plain


def _plain(manifest: Manifest) -> Manifest:
    """What the manifest would be without compression."""

    def plain(blob: Blob) -> Blob:
        if (table := blob.frames) is None:
            return blob
        return replace(
            blob,
            file=blob.raw_file,
            file_bytes=table.raw_bytes,
            digest=table.raw_digest,
            frames=None,
        )

    return replace(manifest, compression=None, blobs=tuple(map(plain, manifest.blobs)))


def _copy_small_files(pack: Pack, destination: Destination) -> None:
    for file in pack.manifest.files:
        try:
            data = (pack.path / file.name).read_bytes()
        except OSError as reason:
            raise PackError(
                f"{pack.path / file.name}: cannot be read ({reason.strerror})"
            ) from reason
        if bytes_digest(data) != file.digest:
            raise PackError(
                f"{pack.path / file.name}: differs from what was written; restore it "
                "or convert again"
            )
        destination.write_file(file.name, data)


def _expand_blobs(pack: Pack, destination: Destination, progress: ProgressCallback | None) -> None:
    reader = raw_reader(pack, open_reader(pack.path / MANIFEST_NAME))
    try:
        for_each_file(
            sorted(pack.manifest.blobs, key=lambda blob: -blob.raw_bytes),
            lambda blob, report: _expand(pack, blob, destination, reader, report),
            num_threads=os.cpu_count() or 1,
            total_bytes=pack.manifest.raw_bytes,
            progress=progress,
        )
    except StreamError as error:
        raise PackError(str(error)) from error
    finally:
        reader.close()


def _expand(
    pack: Pack, blob: Blob, destination: Destination, reader: Reader, report: ReportBytes
) -> None:
    table, source, digest = blob.frames, pack.blob_path(blob), Digest()
    cuts = list(_cuts(blob.raw_bytes, table))
    # Whole pages: direct reads need them.
    buffer = memoryview(mmap.mmap(-1, align_up(max(end - begin for begin, end in cuts))))
    with contextlib.closing(open_output(destination.pack / blob.raw_file)) as output:
        for begin, end in cuts:
            reader.read(source, begin, end - begin, buffer)
            digest.update(buffer[: end - begin])
            output.write(buffer[: end - begin])
            report(end - begin)
        output.finish()
    if digest.text != (blob.digest if table is None else table.raw_digest):
        raise PackError(f"{source}: expands to other bytes than were packed; run layerpack verify")


def _cuts(raw_bytes: int, table: FrameTable | None) -> Iterator[tuple[int, int]]:
    """Ranges of raw bytes that begin and end with frames, where there are frames."""
    first, step = 0, _PIECE_BYTES
    if table is not None:
        first, step = table.first_bytes, max(1, step // table.frame_bytes) * table.frame_bytes
        yield 0, first
    for begin in range(first, raw_bytes, step):
        yield begin, min(begin + step, raw_bytes)
