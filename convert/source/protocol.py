"""What a checkpoint is to the converter, wherever it comes from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensor:
    """One tensor of a checkpoint, as `Source.read` will return it.

    `dtype` is a safetensors name. `file` is the source file that it lies in, `offset_bytes` and
    `length_bytes` where in that file (used to order and to weigh the work). `whole_only`: some of
    its rows cost as much as all of them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset_bytes: int
    length_bytes: int
    whole_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFileFacts:
    """One file with weights. `identity` changes when the content does and costs no full read.

    For a Hub file it is the stated hash, for a local one size and time of change. `remote`: it has
    to be downloaded first.
    """

    name: str
    file_bytes: int
    identity: str
    remote: bool = field(default=False, compare=False)


def local_facts(name: str, path: Path) -> SourceFileFacts:
    """Those of a file on this machine, listed as `name`. Raises OSError."""
    stat = path.stat()
    return SourceFileFacts(
        name=name, file_bytes=stat.st_size, identity=f"{stat.st_size}:{stat.st_mtime_ns}"
    )


def path_id(path: Path) -> str:
    """A path as a manifest can hold it: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")


def real_path(path: Path) -> str:
    """The same for every way to spell the path: absolute, no link in it. For `Source.place`."""
    return path_id(Path(os.path.realpath(path)))


class Source(Protocol):
    """A checkpoint whose headers have been read and checked, and whose weights have not.

    Life of a file: NAMED -fetch-> READABLE -release-> GONE. `fetch` is called from one thread,
    ahead of need; `read` from several others at a time, only between a file's fetch and its
    release. Opening, fetching and reading raise SourceError (HubError from the Hub).
    """

    @property
    def kind(self) -> str:
        """`directory`, `hub` or `gguf`."""

    @property
    def id(self) -> str:
        """The repo id or the path as the user gave it: the manifest's `source.id`."""

    @property
    def place(self) -> str:
        """Where it really is, the same however a path to it is spelt; the repo id if on the Hub."""

    @property
    def revision(self) -> str | None:
        """The commit hash that the Hub resolved, else None."""

    @property
    def config_dir(self) -> Path:
        """A local directory with config.json, tokenizer and generation files; weights may lack."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor of the checkpoint by name."""

    @property
    def files(self) -> Sequence[SourceFileFacts]:
        """The files that hold weights, in their own order."""

    @property
    def scratch_bytes(self) -> int:
        """Disk space needed beside the pack while converting: 0 if nothing is downloaded."""

    @property
    def download_bytes(self) -> int:
        """Bytes of weights that are not on this machine yet."""

    @property
    def max_held_files(self) -> int:
        """How many files may be readable at a time before the next is fetched ahead of need."""

    def fetch(self, file: str, report: Callable[[int], None]) -> None:
        """Wait until `file` is readable. `report` takes the bytes that arrived since last time."""

    def digest(self, file: str, check: Callable[[], None] = lambda: None) -> str:
        """Digest of a readable file (`sha256:…` or `xxh3_128:…`); may read all of it.

        `check` is called on the way and may raise to end it.
        """

    def read(
        self, name: str, rows: tuple[int, int] | None = None, *, pin: bool = False
    ) -> torch.Tensor:
        """The tensor on the CPU, or its rows [begin, end) along the first dimension.

        Contiguous, of the stated dtype; memory is what is returned, no more than a small multiple.
        `pin`: in page-locked memory, if that takes no copy.
        """

    def release(self, file: str) -> None:
        """No tensor of `file` will be read again. Its scratch copy, if any, may go."""

    def __enter__(self) -> Source: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
