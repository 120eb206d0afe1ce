"""Which kind of source a name on the command line stands for."""

from __future__ import annotations

from pathlib import Path

from layerpack.convert.options import ConvertOptions
from layerpack.convert.source.directory import DirectorySource
from layerpack.convert.source.protocol import Source
from layerpack.formats.errors import SourceError
from layerpack.formats.text import is_repo_id


def open_source(name: str, options: ConvertOptions, *, scratch: Path) -> Source:
    """The checkpoint called `name`: a directory or a GGUF file that exists, else a Hub repo.

    Headers are read and checked, weights are not. `scratch` is a directory, made when needed, for
    downloads. Raises SourceError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _refuse_revision(name, options)
        return DirectorySource(path)
    if path.exists() or name.endswith(".gguf"):
        _refuse_revision(name, options)
        return _open_file(path)
    if not is_repo_id(name):
        raise SourceError(f"{name}: no such directory, and not the name of a Hub repository")
    from layerpack.convert.hub.source import HubSource

    return HubSource.open(
        name, revision=options.revision, scratch=scratch, keep_source=options.keep_source
    )


def _open_file(path: Path) -> Source:
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if path.suffix != ".gguf":
        raise SourceError(
            f"{path}: a file, but not a GGUF one; name the directory of a checkpoint, a GGUF file "
            "or a Hub repository"
        )
    from layerpack.convert.gguf.source import GgufSource

    return GgufSource.open(path)


def _refuse_revision(name: str, options: ConvertOptions) -> None:
    if options.revision is not None:
        raise SourceError(f"{name}: is on this machine, so it has no --revision; leave it out")
