"""A conversion that is not done yet, seen from outside: how far it is, and whether it runs.

Reads the journal and the directory, and changes nothing. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from layerpack.convert.output.destination import Destination
from layerpack.convert.output.journal import BlobRecord, read_journal
from layerpack.convert.output.outline import Outline, parse_outline
from layerpack.formats.disk import PARTIAL_SUFFIX
from layerpack.formats.frames.table import FRAMES_SUFFIX
from layerpack.formats.manifest.facts import UNFINISHED_SUFFIX


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """`outline` is None if the journal has none yet: nothing is known but what lies there.

    `done` and `missing` are names of blobs; `started` is (file, bytes) of the one being written.
    `digested_files` counts source files that have been read whole; `scratch_bytes` are downloads.
    `stored_bytes` are those of the blobs that are done as they lie there, compressed or not.
    """

    partial: Path
    out: Path
    outline: Outline | None
    done: tuple[str, ...]
    missing: tuple[str, ...]
    started: tuple[str, int] | None
    stored_bytes: int
    digested_files: int
    scratch_bytes: int
    running: bool

    @property
    def compressed(self) -> bool:
        """Whether the pack to be is a compressed one."""
        return any(file.endswith(FRAMES_SUFFIX) for file in (*self.done, *self.missing))

    @property
    def total_bytes(self) -> int:
        """Bytes of all blobs of the pack to be, uncompressed."""
        return sum(self.outline.blobs.values()) if self.outline else 0

    @property
    def done_bytes(self) -> int:
        """Bytes of the blobs that are done, uncompressed."""
        return sum(self.outline.blobs[file] for file in self.done) if self.outline else 0


def find_unfinished(target: Path) -> Path | None:
    """The directory of an unfinished conversion to `target`, or `target` if it is one itself."""
    if not Path(os.path.abspath(target)).name:  # the root: nothing is beside it
        return None
    if target.name.removesuffix(UNFINISHED_SUFFIX) not in ("", target.name) and target.is_dir():
        return target
    partial = Destination(target).partial
    return partial if partial.is_dir() else None


def read_unfinished(partial: Path) -> Unfinished:
    """How far the conversion in `partial` is. Raises OSError if it cannot be read."""
    place = Destination(partial.with_name(partial.name.removesuffix(UNFINISHED_SUFFIX)))
    progress = read_journal(place.journal)
    outline = parse_outline(progress.about)
    sizes = {}
    for path in place.pack_files():
        with contextlib.suppress(FileNotFoundError):  # a running conversion renames them
            sizes[path.name] = path.stat().st_size
    planned = outline.blobs if outline else {}
    done = tuple(
        file
        for file, file_bytes in planned.items()
        if file in progress.blobs
        and sizes.get(file) == _stored_bytes(progress.blobs[file], file_bytes)
    )
    started = [
        (name.removesuffix(PARTIAL_SUFFIX), file_bytes)
        for name, file_bytes in sizes.items()
        if name.endswith(PARTIAL_SUFFIX)
    ]
    return Unfinished(
        partial=partial,
        out=place.out,
        outline=outline,
        done=done,
        missing=tuple(file for file in planned if file not in done),
        started=started[0] if started else None,
        stored_bytes=sum(sizes[file] for file in done),
        digested_files=len(progress.source_digests),
        scratch_bytes=_tree_bytes(place.scratch),
        running=place.is_held(),
    )


def _stored_bytes(record: BlobRecord, planned_bytes: int) -> int:
    """What a plan cannot know is how far a blob was compressed."""
    return planned_bytes if record.frames is None else record.frames.file_bytes


def _tree_bytes(path: Path) -> int:
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # a running conversion deletes what it no longer needs
            continue
    return total
