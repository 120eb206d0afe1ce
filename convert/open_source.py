"""Which kind of source a name on the command line stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from layerpack.convert.options import ConvertOptions
from layerpack.convert.source.directory import DirectorySource
from layerpack.convert.source.protocol import Source
from layerpack.formats.errors import SourceError
from layerpack.formats.text import is_repo_id

if TYPE_CHECKING:
    from layerpack.convert.hub.client import Listing

_CACHED = re.compile(r"models--(.+)")
_GGUF = ".gguf"


def open_source(name: str, options: ConvertOptions, *, scratch: Path) -> Source:
    """The checkpoint called `name`: a directory or a GGUF file that exists, else a Hub repo.

    A directory may hold a GGUF file alone, or be one of the Hub's cache; a repository may be named
    by its address. Headers are read and checked, weights are not. `scratch` is a directory, made
    when needed, for downloads. Raises SourceError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "snapshots").is_dir() and _CACHED.fullmatch(path.resolve().name):
            return _open_directory(_snapshot(path, options.revision))
        _refuse_revision(name, options)
        return _open_directory(path)
    if path.exists() or (name.endswith(_GGUF) and "://" not in name):
        _refuse_revision(name, options)
        return _open_file(path)
    repo, revision, file = _repository(name)
    if revision is not None and options.revision not in (None, revision):
        raise SourceError(
            f"{name}: names {revision}, and --revision {options.revision}; choose one"
        )
    from layerpack.convert.hub.client import list_repo

    listing, keep_source = list_repo(repo, options.revision or revision), options.keep_source
    if models := _gguf_models(listing.files, file):
        return _open_remote(listing, models, scratch=scratch, keep_source=keep_source)
    from layerpack.convert.hub.source import HubSource

    return HubSource(listing, scratch=scratch, keep_source=keep_source)


def _repository(name: str) -> tuple[str, str | None, str]:
    """(owner/name, revision or None, file or "") of a repository's name or address.

    Raises SourceError.
    """
    if is_repo_id(name):
        return name, None, ""
    address = urlsplit(name)
    if address.scheme in ("http", "https"):
        # …/owner/name, and behind it tree, blob or resolve, a revision, and a file
        parts = [unquote(part) for part in address.path.split("/") if part]
        repo, kind, revision = "/".join(parts[:2]), parts[2:3], parts[3:4]
        if is_repo_id(repo) and len(parts) >= 2 and kind in ([], ["tree"], ["blob"], ["resolve"]):
            return repo, revision[0] if revision else None, "/".join(parts[4:])
        raise SourceError(f"{name}: not the address of a model on a Hub; give it as owner/name")
    raise SourceError(f"{name}: no such directory, and not the name of a Hub repository")


def _snapshot(cached: Path, revision: str | None) -> Path:
    """The files of one commit in a repository's folder of the Hub's cache. Raises SourceError."""
    ref = cached / "refs" / (revision or "main")
    commits = sorted(path.name for path in (cached / "snapshots").iterdir() if path.is_dir())
    commit = ref.read_text().strip() if ref.is_file() else revision
    if commit is None and len(commits) == 1:
        commit = commits[0]
    if commit not in commits:
        known = ", ".join(commits) or "none"
        raise SourceError(
            f"{cached}: has no snapshot of {revision or 'main'}; its commits are {known}: name one "
            "with --revision"
        )
    return cached / "snapshots" / commit


def _open_directory(path: Path) -> Source:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as reason:
        raise SourceError(f"{path}: cannot be read ({reason.strerror})") from reason
    models = _gguf_models(names)
    if not models:
        return DirectorySource(path)
    if len(models) > 1:
        raise SourceError(f"{path}: holds {len(models)} GGUF models; name one: {', '.join(models)}")
    return _open_file(path / models[0])


def _gguf_models(names: Iterable[str], named: str = "") -> list[str]:
    """The first file of each GGUF model, if there is nothing else, or of the one that is named."""
    names = list(names)
    found = [name for name in names if name.endswith(_GGUF)]
    if named.endswith(_GGUF):
        return [named]
    if not found or any(name.endswith(".safetensors") for name in names):
        return []
    from layerpack.convert.gguf.parts import first_parts

    return first_parts(found)


def _open_remote(
    listing: Listing, models: list[str], *, scratch: Path, keep_source: bool
) -> Source:
    from layerpack.convert.hub.errors import endpoint

    where = f"{endpoint()}/{listing.repo}/blob/{listing.revision or 'main'}"
    if len(models) > 1:
        raise SourceError(
            f"{listing.repo}: holds {len(models)} GGUF models; give the address of one, as "
            f"{where}/{models[0]}; the others are {', '.join(models[1:])}"
        )
    from layerpack.convert.gguf.parts import part_names
    from layerpack.convert.gguf.source import GgufSource
    from layerpack.convert.hub.large_files import LargeFiles

    names = part_names(models[0])
    for name in names:
        if name not in listing.files:
            raise SourceError(f"{listing.repo}: has no file {name}")
    files = LargeFiles(listing, names, scratch=scratch, keep_source=keep_source)
    return GgufSource.open(files)


def _open_file(path: Path) -> Source:
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if path.suffix != _GGUF:
        raise SourceError(
            f"{path}: a file, but not a GGUF one; name the directory of a checkpoint, a GGUF file "
            "or a Hub repository"
        )
    from layerpack.convert.gguf.files import LocalFiles
    from layerpack.convert.gguf.source import GgufSource

    return GgufSource.open(LocalFiles(path))


def _refuse_revision(name: str, options: ConvertOptions) -> None:
    if options.revision is not None:
        raise SourceError(f"{name}: is on this machine, so it has no --revision; leave it out")
