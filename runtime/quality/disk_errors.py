"""What a disk refuses, as an error of layerpack: for files that the same command goes on with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerpack.formats.disk import is_full
from layerpack.formats.errors import DiskFullError, TargetError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """In the block an OSError becomes a DiskFullError or a TargetError that names `path`."""
    try:
        yield
    except OSError as reason:
        if is_full(reason):
            raise DiskFullError(
                f"{path}: the disk is full; make room and run the same command again, it goes on "
                "from there"
            ) from reason
        raise TargetError(f"{path}: cannot be written ({reason.strerror})") from reason
