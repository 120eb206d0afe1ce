"""What of a conversion is done, on disk, so that the same command goes on after any break.

One line a fact: a digest of the line, a space, a JSON object. A line is appended, and fsynced, only
after what it says is on the disk itself. Every line carries the run's fingerprint, so each can be
trusted, or not, by itself: a torn or changed line costs the work that it stood for, no more.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerpack.formats.blob.header import is_shape, is_size
from layerpack.formats.blob.nf4 import Nf4State, is_finite
from layerpack.formats.digest import bytes_digest, is_digest
from layerpack.formats.disk import write_whole
from layerpack.formats.frames.table import FrameTable
from layerpack.formats.jsontext import parse_json

JOURNAL_NAME = "journal"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRecord:
    """A blob that is whole and on the disk, and the state of each NF4 weight in it.

    `frames` is set if it is compressed.
    """

    file: str
    digest: str
    states: dict[str, Nf4State]
    frames: FrameTable | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is done. `runs` are the fingerprints that a journal's lines carry: one, unless mixed.

    `about` is what the run noted of itself for people (outline.py): nothing is decided by it.
    """

    runs: frozenset[str] = frozenset()
    blobs: dict[str, BlobRecord] = field(default_factory=dict)
    source_digests: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def fingerprint(facts: Mapping[str, Any]) -> str:
    """One short text for everything that decides the pack's bytes."""
    return bytes_digest(json.dumps(facts, sort_keys=True).encode())


def read_journal(path: Path) -> Progress:
    """What the journal at `path` says, if there is one. Lines that are damaged are skipped.

    Raises OSError.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return Progress()
    runs: set[str] = set()
    progress = Progress()
    for line in raw.split(b"\n"):
        fields = _parse_line(line)
        if fields is None:
            continue
        runs.add(fields["run"])
        if (record := _blob_record(fields)) is not None:
            progress.blobs[record.file] = record
        elif isinstance(fields.get("source"), str) and isinstance(fields.get("digest"), str):
            progress.source_digests[fields["source"]] = fields["digest"]
        elif isinstance(fields.get("about"), dict):
            progress.about.update(fields["about"])
    return Progress(
        runs=frozenset(runs),
        blobs=progress.blobs,
        source_digests=progress.source_digests,
        about=progress.about,
    )


class Journal:
    """Appends lines, from any thread. Each method returns when its line is on the disk.

    `progress` is what they say, those of earlier runs included. Opening rewrites the file with the
    lines that are known to be good, so that no new line is appended to a torn one. OSError passes
    through. Use as a context manager.
    """

    def __init__(self, path: Path, run: str, progress: Progress) -> None:
        self.progress = progress
        lines = [_source_line(run, name, text) for name, text in progress.source_digests.items()]
        lines += [_blob_line(run, record) for record in progress.blobs.values()]
        lines.insert(0, _line({"run": run, "about": progress.about}))
        self._run = run
        self._lock = threading.Lock()
        write_whole(path, b"".join(lines))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__

    def blob(self, record: BlobRecord) -> None:
        """Note a blob whose file, and the directory entry of it, are on the disk."""
        self._append(_blob_line(self._run, record))
        self.progress.blobs[record.file] = record

    def source_digest(self, file: str, digest: str) -> None:
        """Note the digest of a source file."""
        self._append(_source_line(self._run, file, digest))
        self.progress.source_digests[file] = digest

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._file.close()

    def _append(self, line: bytes) -> None:
        with self._lock:
            left = memoryview(line)
            while left.nbytes:  # of a full disk's last page a part may be taken, without an error
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())


def _line(fields: Mapping[str, Any]) -> bytes:
    text = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
    return bytes_digest(text).encode() + b" " + text + b"\n"


def _source_line(run: str, file: str, digest: str) -> bytes:
    return _line({"run": run, "source": file, "digest": digest})


def _blob_line(run: str, record: BlobRecord) -> bytes:
    return _line(
        {
            "run": run,
            "blob": record.file,
            "digest": record.digest,
            "states": {
                name: [list(state.shape), state.block_size, state.dtype, state.nested_offset]
                for name, state in record.states.items()
            },
            "frames": record.frames and _frame_fields(record.frames),
        }
    )


def _frame_fields(table: FrameTable) -> dict[str, Any]:
    return {
        "first_bytes": table.first_bytes,
        "frame_bytes": table.frame_bytes,
        "raw_bytes": table.raw_bytes,
        "raw_digest": table.raw_digest,
        "stored_bytes": [frame.stored_bytes for frame in table.frames],
        "coding": "".join(frame.coding.value for frame in table.frames),
    }


def _parse_line(line: bytes) -> dict[str, Any] | None:
    digest, _, text = line.partition(b" ")
    if not text or digest != bytes_digest(text).encode():
        return None
    try:
        fields = parse_json(text)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and isinstance(fields.get("run"), str) else None


def _blob_record(fields: Mapping[str, Any]) -> BlobRecord | None:
    file, digest, states = fields.get("blob"), fields.get("digest"), fields.get("states")
    if not (isinstance(file, str) and is_digest(digest) and isinstance(states, dict)):
        return None
    read = {name: _state(value) for name, value in states.items()}
    whole = {name: state for name, state in read.items() if state is not None}
    frames = fields.get("frames")
    table = None if frames is None else _frames(frames)
    if whole != read or (frames is not None and table is None):
        return None
    return BlobRecord(file=file, digest=str(digest), states=whole, frames=table)


def _state(value: Any) -> Nf4State | None:
    if not (isinstance(value, list) and len(value) == 4):
        return None
    shape, block_size, dtype, offset = value
    if not (is_shape(shape) and is_size(block_size) and isinstance(dtype, str)):
        return None
    if not (offset is None or is_finite(offset)):
        return None
    return Nf4State(shape=tuple(shape), block_size=block_size, dtype=dtype, nested_offset=offset)


def _frames(value: Any) -> FrameTable | None:
    if not isinstance(value, dict):
        return None
    lengths, coding, digest = (value.get(key) for key in ("stored_bytes", "coding", "raw_digest"))
    sizes = [value.get(key) for key in ("first_bytes", "frame_bytes", "raw_bytes")]
    if not (isinstance(lengths, list) and all(map(is_size, [*sizes, *lengths]))):
        return None
    if not (isinstance(coding, str) and is_digest(digest)):
        return None
    try:
        return FrameTable.build(**value)
    except (TypeError, ValueError):  # a key that is not known, or figures that do not add up
        return None
