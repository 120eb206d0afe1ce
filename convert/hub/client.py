"""Questions to the Hub: which files, at which commit, and what the headers of its weights say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from layerpack.convert.hub.errors import call_hub, require_endpoint
from layerpack.formats.blob.header import TensorEntry, header_entries
from layerpack.formats.errors import HubError
from layerpack.formats.text import first_line
from layerpack.libraries.hub_api import range_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file as the Hub states it; `sha256` (hex) only of large ones, `cached` if it is here."""

    name: str
    file_bytes: int
    sha256: str | None
    cached: Path | None

    @property
    def identity(self) -> str:
        """Changes with the content as far as the Hub tells."""
        return f"sha256:{self.sha256}" if self.sha256 else f"size:{self.file_bytes}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A repository at one commit. Names have no directory in them, but for GGUF files.

    `revision` is the name that was asked for. `offline`: these are only the files that the local
    cache has.
    """

    repo: str
    revision: str | None
    commit: str
    files: Mapping[str, RemoteFile]
    offline: bool = False


def list_repo(repo: str, revision: str | None) -> Listing:
    """One request; offline, what the local cache has. Raises HubError."""
    require_endpoint()
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return _list_cached(repo, revision)
    where = repo if revision is None else f"{repo}: revision {revision}"
    timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT  # else a line that swallows all is never given up
    info = call_hub(
        where,
        lambda: HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout_s),
        is_first=True,
    )
    files = {}
    for sibling in info.siblings or ():
        name, size_bytes = sibling.rfilename, sibling.size
        nested = "/" in name or "\\" in name
        if (nested and not name.endswith(".gguf")) or size_bytes is None:
            continue
        cached = try_to_load_from_cache(repo, name, revision=info.sha)
        files[name] = RemoteFile(
            name=name,
            file_bytes=size_bytes,
            sha256=sibling.lfs.sha256 if sibling.lfs else None,
            cached=Path(cached) if isinstance(cached, str) else None,
        )
    if info.sha is None:
        raise HubError(f"{where}: the Hub states no commit for it")
    return Listing(repo=repo, revision=revision, commit=info.sha, files=files)


def remote_header(listing: Listing, name: str) -> tuple[TensorEntry, ...]:
    """The header of a safetensors file, by one or two range requests. Raises HubError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    where, file = f"{listing.repo}: {name}", listing.files[name]
    try:
        found = call_hub(
            where,
            lambda: HfApi().parse_safetensors_file_metadata(
                listing.repo, name, revision=listing.commit
            ),
        )
    except SafetensorsParsingError as reason:
        raise HubError(f"{where}: not a safetensors header ({first_line(reason)})") from reason
    data_bytes = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
    table = {
        tensor: {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": list(info.data_offsets),
        }
        for tensor, info in found.tensors.items()
    }
    return header_entries(
        table,
        data_start=file.file_bytes - data_bytes,
        file_bytes=file.file_bytes,
        where=where,
        error=HubError,
    )


def read_range(listing: Listing, name: str, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file, by a range request. Raises HubError."""
    where = f"{listing.repo}: {name}"
    found = call_hub(where, lambda: range_of(listing.repo, name, listing.commit, begin, end))
    if len(found) != end - begin:
        raise HubError(f"{where}: {len(found)} bytes arrived where {end - begin} were asked for")
    return found


def _list_cached(repo: str, revision: str | None) -> Listing:
    from huggingface_hub import hf_hub_download

    config = call_hub(
        repo,
        lambda: hf_hub_download(repo, "config.json", revision=revision, local_files_only=True),
    )
    snapshot = Path(config).parent
    return Listing(
        repo=repo,
        revision=revision,
        commit=snapshot.name,
        files={path.name: _cached_file(path) for path in snapshot.iterdir() if path.is_file()},
        offline=True,
    )


def _cached_file(path: Path) -> RemoteFile:
    blob = path.resolve().name  # the cache names a large file's content by its sha256
    return RemoteFile(
        name=path.name,
        file_bytes=path.stat().st_size,
        sha256=blob if len(blob) == 64 else None,
        cached=path,
    )
