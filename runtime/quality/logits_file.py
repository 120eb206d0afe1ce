"""A reference's logits on disk: computed once, compared with many packs.

A safetensors file with the windows' `tokens` and `logits` (windows, scored tokens, vocabulary) in
the model's own dtype, so nothing is lost. While it is made it has another name and all its header;
windows follow one another, so whoever goes on knows by its length how many are done.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from layerpack.formats.disk import PARTIAL_SUFFIX, sync_directory, try_lock
from layerpack.formats.errors import DiskFullError, PackError, TargetError
from layerpack.formats.text import first_line
from layerpack.formats.units import PAGE_BYTES, align_up, human_bytes
from layerpack.libraries.dtypes import SAFETENSORS_DTYPES
from layerpack.runtime.quality.disk_errors import disk_errors
from layerpack.runtime.quality.windows import Windows

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsShape:
    """What decides a file's bytes, but for the logits' own. `reference` is whose they are."""

    windows: Windows
    num_vocabulary: int
    dtype: torch.dtype
    reference: str

    @property
    def window_bytes(self) -> int:
        """Logits of one window."""
        return self.windows.num_scored * self.num_vocabulary * self.dtype.itemsize

    @property
    def logits_bytes(self) -> int:
        """Logits of all windows: the file, but for a few kilobytes."""
        return len(self.windows) * self.window_bytes

    def opening(self) -> bytes:
        """All that stands before the logits: header and tokens, whole pages."""
        tokens = self.windows.ids.numpy().tobytes()
        padded = align_up(len(tokens), PAGE_BYTES)
        shape = [len(self.windows), self.windows.num_scored, self.num_vocabulary]
        # safetensors allows no bytes that belong to no tensor.
        fields = {
            "__metadata__": {"layerpack": "logits", "reference": self.reference},
            "tokens": {
                "dtype": "I64",
                "shape": list(self.windows.ids.shape),
                "data_offsets": [0, len(tokens)],
            },
            "padding": {
                "dtype": "U8",
                "shape": [padded - len(tokens)],
                "data_offsets": [len(tokens), padded],
            },
            "logits": {
                "dtype": SAFETENSORS_DTYPES[self.dtype],
                "shape": shape,
                "data_offsets": [padded, padded + self.logits_bytes],
            },
        }
        header = json.dumps(fields, separators=(",", ":")).encode()
        length = align_up(len(header) + _LENGTH.size, PAGE_BYTES) - _LENGTH.size
        filled = header.ljust(length, b" ") + tokens.ljust(padded, b"\0")
        return _LENGTH.pack(length) + filled


class LogitsWriter:
    """Appends windows; make one with `writing`."""

    def __init__(self, path: Path, shape: LogitsShape, file: BinaryIO, num_done: int) -> None:
        self._path, self._shape, self._file = path, shape, file
        self.num_done = num_done
        """Windows that are there."""

    def append(self, logits: torch.Tensor) -> None:
        """The next windows' (windows, scored tokens, vocabulary). Raises DiskFullError."""
        raw = logits.to(self._shape.dtype).cpu().contiguous().view(torch.uint8)
        with disk_errors(self._path):
            self._file.write(raw.numpy().data)
        self.num_done += len(logits)


@contextmanager
def writing(path: Path, shape: LogitsShape) -> Iterator[LogitsWriter]:
    """Write the file, or go on with it; it has its name once all windows are in it.

    Raises DiskFullError before anything is written, or when it happens; TargetError.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    opening = shape.opening()
    with disk_errors(path):
        with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            if not try_lock(file.fileno()):
                raise TargetError(f"{path}: another process is making it")
            num_done = _num_done(file, opening, shape.window_bytes)
            try:
                _check_room(path, (len(shape.windows) - num_done) * shape.window_bytes)
            except DiskFullError:
                if not num_done:
                    partial.unlink()
                raise
            if not num_done:
                file.seek(0)
                file.write(opening)
            file.truncate(len(opening) + num_done * shape.window_bytes)
            file.seek(0, os.SEEK_END)
            writer = LogitsWriter(path, shape, file, num_done)
            yield writer
            if writer.num_done < len(shape.windows):
                return
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(path.absolute().parent)


def _num_done(file: BinaryIO, opening: bytes, window_bytes: int) -> int:
    """Whole windows in an unfinished file of the same shape; 0 if it is another's, or new."""
    if file.read(len(opening)) != opening:
        return 0
    return (os.fstat(file.fileno()).st_size - len(opening)) // window_bytes


def _check_room(path: Path, missing_bytes: int) -> None:
    free_bytes = shutil.disk_usage(path.absolute().parent).free
    if free_bytes < missing_bytes:
        raise DiskFullError(
            f"{path}: {human_bytes(missing_bytes)} of logits to write, "
            f"{human_bytes(free_bytes)} free; make room, or take fewer windows with --windows"
        )


class LogitsFile:
    """A whole file, for reading; make one with `open`."""

    def __init__(
        self, path: Path, file: object, reference: str, ids: torch.Tensor, num_vocabulary: int
    ) -> None:
        self._path, self._file = path, file
        self.reference, self.ids, self.num_vocabulary = reference, ids, num_vocabulary
        """Whose logits they are; the tokens of its windows; how many logits a token has."""

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[LogitsFile]:
        """Raises PackError if it is none."""
        from safetensors import SafetensorError, safe_open

        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                facts = file.metadata() or {}
                if facts.get("layerpack") != "logits":
                    raise PackError(f"{path}: holds no logits of `layerpack eval`")
                ids = file.get_tensor("tokens")
                shape = file.get_slice("logits").get_shape()
            except (OSError, SafetensorError) as reason:
                raise PackError(f"{path}: cannot be read ({first_line(reason)})") from reason
            if len(shape) != 3 or shape[:2] != [len(ids), Windows(ids=ids).num_scored]:
                raise PackError(f"{path}: its logits are not those of its tokens; make it again")
            yield cls(path, file, facts.get("reference", ""), ids, shape[2])

    def check(self, windows: Windows) -> None:
        """Raises PackError unless it begins with these windows."""
        if not torch.equal(self.ids[: len(windows)], windows.ids):
            raise PackError(
                f"{self._path}: holds the logits of another text, other windows or another "
                f"tokenizer (it has {len(self.ids)} windows of {self.ids.shape[1]} tokens); give "
                "the same --text, --window and --windows, or another file"
            )

    def logits(self, begin: int, end: int) -> torch.Tensor:
        """Of windows `begin` to `end`: (windows, scored tokens, vocabulary), in memory."""
        found: torch.Tensor = self._file.get_slice("logits")[begin:end]  # type: ignore[attr-defined]
        return found
