"""A checkpoint directory on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from layerpack.convert.source.index import ADAPTER_NAME, INDEX_NAME, merge_tensors, which_weights
from layerpack.convert.source.protocol import SourceTensor, local_facts, path_id, real_path
from layerpack.convert.source.reading import weights_digest
from layerpack.convert.source.shard import Shard, source_tensor
from layerpack.formats.errors import SourceError
from layerpack.formats.frames.table import FRAMES_SUFFIX


class DirectorySource:
    """A Source over local files. Opening it reads and checks every header, and no weight."""

    kind = "directory"
    revision: str | None = None
    scratch_bytes = 0
    download_bytes = 0
    max_held_files = 2
    """A file is held while its digest is taken, which brings it into the page cache ahead of the
    tensors' reads. One ahead is enough, and on a machine with little memory a second one would push
    the first out before it is read: the disk would then have to give every byte twice.
    """

    def __init__(self, path: Path) -> None:
        """Raises SourceError naming the file that is missing, truncated or not readable."""
        if not path.is_dir():
            raise SourceError(f"{path}: no such directory")
        if not (path / "config.json").is_file():
            if (path / ADAPTER_NAME).is_file():
                which_weights([ADAPTER_NAME], bytes, where=str(path))
            raise SourceError(f"{path}: no config.json in it, so not a Hugging Face checkpoint")
        self.id, self.place = path_id(path), real_path(path)
        self.config_dir = path
        self._shards: dict[str, Shard] = {}
        self.tensors: dict[str, SourceTensor] = {}
        try:
            self._open_shards(path)
        except BaseException:
            self._close()
            raise
        self.files = tuple(local_facts(file, shard.path) for file, shard in self._shards.items())

    def fetch(self, file: str, report: Callable[[int], None]) -> None:
        """Nothing to wait for: local files are readable."""

    def digest(self, file: str, check: Callable[[], None] = lambda: None) -> str:
        """xxh3_128 of the whole file; as a side effect the file enters the page cache."""
        return weights_digest(self._shards[file].path, check)

    def read(
        self, name: str, rows: tuple[int, int] | None = None, *, pin: bool = False
    ) -> torch.Tensor:
        """The tensor, or its rows [begin, end). Raises SourceError."""
        return self._shards[self.tensors[name].file].read(name, rows, pin=pin)

    def release(self, file: str) -> None:
        """Close the file."""
        self._shards[file].close()

    def __enter__(self) -> DirectorySource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _open_shards(self, path: Path) -> None:
        try:
            names = {entry.name for entry in path.iterdir()}
        except OSError as reason:
            raise SourceError(f"{path}: cannot be read ({reason.strerror})") from reason
        weights = which_weights(names, lambda: _read(path / INDEX_NAME), where=str(path))
        found: dict[str, Iterable[SourceTensor]] = {}
        for file in weights.files:
            if file + FRAMES_SUFFIX in names:
                raise SourceError(
                    f"{path}: a compressed pack; expand it with `layerpack unpack`, and convert "
                    "what comes out"
                )
            if file not in names:
                raise SourceError(f"{path / file}: named in {INDEX_NAME} but missing")
            listed = path_id(Path(file))
            shard = self._shards[listed] = Shard(path / file)
            found[listed] = map(partial(source_tensor, listed), shard.entries.values())
        self.tensors = merge_tensors(found, weights.mapped, where=str(path))

    def _close(self) -> None:
        for shard in self._shards.values():
            shard.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as reason:
        raise SourceError(f"{path}: cannot be read ({reason.strerror})") from reason
