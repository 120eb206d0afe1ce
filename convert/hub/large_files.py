"""Large files of a repository whose beginnings are enough to plan with: fetched when they are read.

A GGUF file cannot be described by its header alone: transformers and the gguf package read files.
So a file of the right size is made that is a hole but for its first bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from layerpack.convert.hub.client import Listing, read_range
from layerpack.convert.hub.download import check_cache_space, fetch_checked
from layerpack.convert.source.protocol import SourceFileFacts

_SPARSE = "headers"
MAX_HELD_FILES = 2
"""One that is read, and the next on its way."""


class LargeFiles:
    """`names` of a repository, each under its own name without directories.

    Life of a file: HOLLOW -fetch-> WHOLE, checked -release-> DELETED (or kept in the cache)
    """

    max_held_files = MAX_HELD_FILES

    def __init__(
        self, listing: Listing, names: Sequence[str], *, scratch: Path, keep_source: bool
    ) -> None:
        """Makes the hollow files, in `scratch`; those that the cache has are whole."""
        self.id = self.place = f"{listing.repo}/{names[0]}"
        self.revision: str | None = listing.commit
        self._listing, self._keep_source = listing, keep_source
        self._scratch = scratch.resolve()
        self._remote = {Path(name).name: listing.files[name] for name in names}
        self.paths: dict[str, Path] = {}
        (scratch / _SPARSE).mkdir(parents=True, exist_ok=True)
        for name, remote in self._remote.items():
            self.paths[name] = remote.cached or scratch / _SPARSE / name
            if remote.cached is None:
                with open(self.paths[name], "wb") as file:
                    file.truncate(remote.file_bytes)

        missing = sorted(r.file_bytes for r in self._remote.values() if r.cached is None)
        self.download_bytes = sum(missing)
        self.scratch_bytes = 0 if keep_source else sum(missing[-MAX_HELD_FILES:])
        if keep_source:
            check_cache_space(listing.repo, self.download_bytes)

    @property
    def facts(self) -> tuple[SourceFileFacts, ...]:
        return tuple(
            SourceFileFacts(
                name=name,
                file_bytes=remote.file_bytes,
                identity=remote.identity,
                remote=remote.cached is None,
            )
            for name, remote in self._remote.items()
        )

    def fill(self, name: str, begin: int, end: int) -> None:
        """Get these bytes of a hollow file; the file's end may come before. Raises HubError."""
        remote = self._remote[name]
        if remote.cached is None and begin < min(end, remote.file_bytes):
            content = read_range(self._listing, remote.name, begin, min(end, remote.file_bytes))
            with open(self.paths[name], "r+b") as file:
                file.seek(begin)
                file.write(content)

    def fetch(self, name: str, report: Callable[[int], None]) -> tuple[Path, str]:
        """Where the whole file is, once it is found to be what the Hub states, and its digest.

        Raises HubError.
        """
        target = None if self._keep_source else self._scratch
        path, sha256 = fetch_checked(self._listing, self._remote[name], target, report)
        return path, f"sha256:{sha256}"

    def release(self, path: Path) -> None:
        """A fetched file will not be read again: one in the scratch directory is deleted."""
        if path.is_relative_to(self._scratch):
            path.unlink(missing_ok=True)
