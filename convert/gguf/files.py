"""Where the files of a GGUF model are: on this machine, or hollow until they are fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from layerpack.convert.gguf.parts import all_parts
from layerpack.convert.source.protocol import SourceFileFacts, local_facts, path_id, real_path
from layerpack.formats import lfs
from layerpack.formats.errors import SourceError

_FIRST_BYTES = 16 << 20
"""As much as all but the largest vocabularies take."""


class Files(Protocol):
    """The files of one model, in order. Their first bytes can be read at `paths` from the start."""

    id: str
    place: str
    revision: str | None
    paths: dict[str, Path]
    download_bytes: int
    scratch_bytes: int
    max_held_files: int

    @property
    def facts(self) -> Sequence[SourceFileFacts]: ...

    def fill(self, name: str, begin: int, end: int) -> None:
        """Let these bytes be there; a file's end may come before."""

    def fetch(self, name: str, report: Callable[[int], None]) -> tuple[Path, str | None]:
        """Where the whole file is, and its digest if that is known by now."""

    def release(self, path: Path) -> None:
        """A fetched file is not needed any more."""


class LocalFiles:
    """The file at `path`, or all parts of the model that it is a part of. Raises SourceError."""

    revision: str | None = None
    download_bytes = scratch_bytes = 0
    max_held_files = 1

    def __init__(self, path: Path) -> None:
        parts = all_parts(path)
        for part in parts:
            try:
                if lfs.is_pointer_file(part):
                    raise SourceError(f"{part}: {lfs.REMEDY}")
            except OSError as reason:
                raise SourceError(f"{part}: cannot be read ({reason.strerror})") from reason
        self.id, self.place = path_id(path), real_path(parts[0])
        self.paths = {path_id(Path(part.name)): part for part in parts}
        self.facts = tuple(local_facts(name, part) for name, part in self.paths.items())

    def fill(self, name: str, begin: int, end: int) -> None:
        """All is there."""

    def fetch(self, name: str, report: Callable[[int], None]) -> tuple[Path, str | None]:
        """Nothing to wait for."""
        return self.paths[name], None

    def release(self, path: Path) -> None:
        """The file stays."""


def fill_header(files: Files, name: str, reader: Callable[[Path], Any]) -> None:
    """Let all be there that `reader`, the gguf package's, reads before the first tensor."""
    fact = next(fact for fact in files.facts if fact.name == name)
    begin, end = 0, _FIRST_BYTES
    while fact.remote and begin < fact.file_bytes:
        files.fill(name, begin, end)
        try:
            if reader(files.paths[name]).data_offset <= end:
                return
        except Exception:  # it read on in the hollow part: anything can be the matter
            if end >= fact.file_bytes:
                raise
        begin, end = end, 4 * end
