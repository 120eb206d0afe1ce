"""A checkpoint on the Hub: headers first, by range requests, then one shard after another.

A shard is downloaded by huggingface_hub into a scratch directory, compared with the digest that the
Hub states, read, and deleted; or it stays in the usual cache, by choice or if it was there before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from layerpack.convert.hub.client import Listing, remote_header
from layerpack.convert.hub.download import (
    check_cache_space,
    download,
    fetch_checked,
    name_commit_in_cache,
)
from layerpack.convert.source.index import ADAPTER_NAME, INDEX_NAME, merge_tensors, which_weights
from layerpack.convert.source.protocol import SourceFileFacts
from layerpack.convert.source.shard import Shard, source_tensor
from layerpack.convert.source.small_files import CONFIG_NAME, QUANTISATION_NAMES, is_copied
from layerpack.formats.blob.header import TensorEntry, read_header
from layerpack.formats.errors import HubError, SourceError

_HEADER_THREADS = 8


class HubSource:
    """A Source over a Hub repository, pinned to the commit that the revision names on opening.

    Life of a shard: REMOTE -fetch-> VERIFIED, OPEN -release-> DELETED (or kept in the cache)
    """

    kind = "hub"
    max_held_files = 3

    def __init__(self, listing: Listing, *, scratch: Path, keep_source: bool) -> None:
        """Fetches the repository's small files and reads the headers of its weights.

        `scratch` is made and used for what is downloaded, and cleared of what broken runs left
        half done. Raises HubError or SourceError.
        """
        for orphan in scratch.rglob("*.incomplete"):
            orphan.unlink(missing_ok=True)
        self.id = self.place = listing.repo
        self.revision = listing.commit
        self.config_dir = scratch / "config"
        self._listing, self._keep_source = listing, keep_source
        self._scratch = scratch.resolve()  # as huggingface_hub tells where a download is
        self._opened: dict[str, Shard] = {}
        self._digests: dict[str, str] = {}
        if CONFIG_NAME not in listing.files and ADAPTER_NAME not in listing.files:
            raise HubError(f"{self.id}: no {CONFIG_NAME} in it, so not a Hugging Face checkpoint")
        self._fetch_small_files()
        index = self.config_dir / INDEX_NAME
        weights = which_weights(listing.files, index.read_bytes, where=self.id)
        self._shards = list(weights.files)
        for name in self._shards:
            if name not in listing.files:
                why = (
                    "not in the local cache (HF_HUB_OFFLINE is set)"
                    if listing.offline
                    else "missing"
                )
                raise HubError(f"{self.id}: {name} is named in {INDEX_NAME} but {why}")
        self._headers = self._read_headers()
        found = {
            file: map(partial(source_tensor, file), self._headers[file]) for file in self._shards
        }
        self.tensors = merge_tensors(found, weights.mapped, where=self.id)
        self.files = tuple(
            SourceFileFacts(
                name=file.name,
                file_bytes=file.file_bytes,
                identity=file.identity,
                remote=file.cached is None,
            )
            for file in map(listing.files.__getitem__, self._shards)
        )
        missing = [listing.files[name] for name in self._shards if not listing.files[name].cached]
        missing_bytes = sorted(file.file_bytes for file in missing)
        self.download_bytes = sum(missing_bytes)
        self.scratch_bytes = 0 if keep_source else sum(missing_bytes[-self.max_held_files :])
        if keep_source:
            check_cache_space(self.id, self.download_bytes)

    def fetch(self, file: str, report: Callable[[int], None]) -> None:
        """Wait until the shard is here and found to be what the Hub states. Raises HubError."""
        target = None if self._keep_source else self._scratch
        remote, header = self._listing.files[file], self._headers[file]
        path, sha256 = fetch_checked(self._listing, remote, target, report, header)
        self._digests[file] = f"sha256:{sha256}"
        self._opened[file] = Shard(path)

    def digest(self, file: str, check: Callable[[], None] = lambda: None) -> str:
        """sha256 of the fetched file; already taken, and compared, by `fetch`."""
        return self._digests[file]

    def read(
        self, name: str, rows: tuple[int, int] | None = None, *, pin: bool = False
    ) -> torch.Tensor:
        """The tensor, or its rows [begin, end). Raises SourceError."""
        return self._opened[self.tensors[name].file].read(name, rows, pin=pin)

    def release(self, file: str) -> None:
        """Close the shard and delete it from the scratch directory."""
        shard = self._opened.pop(file)
        shard.close()
        if shard.path.is_relative_to(self._scratch):
            shard.path.unlink(missing_ok=True)

    def __enter__(self) -> HubSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Whole shards stay in the scratch directory: a resumed run finds them there.
        for shard in self._opened.values():
            shard.close()

    def _fetch_small_files(self) -> None:
        self.config_dir.mkdir(parents=True, exist_ok=True)
        for path in self.config_dir.iterdir():  # from a run that was at another commit
            if path.is_file() and path.name not in self._listing.files:
                path.unlink()
        for name, remote in self._listing.files.items():
            wanted = name in (CONFIG_NAME, INDEX_NAME, *QUANTISATION_NAMES)
            if not wanted and not is_copied(name):
                continue
            if remote.cached is None and not self._keep_source:
                download(self._listing, remote, self.config_dir)
                continue
            path = remote.cached or download(self._listing, remote, None)
            shutil.copyfile(path, self.config_dir / name)

        if self._keep_source and not self._listing.offline:
            name_commit_in_cache(self._listing, CONFIG_NAME)

    def _read_headers(self) -> dict[str, tuple[TensorEntry, ...]]:
        def read(name: str) -> tuple[TensorEntry, ...]:
            cached = self._listing.files[name].cached
            if cached is not None:
                return read_header(cached, error=SourceError)
            return remote_header(self._listing, name)

        with ThreadPoolExecutor(_HEADER_THREADS, "headers") as pool:
            return dict(zip(self._shards, pool.map(read, self._shards), strict=True))
