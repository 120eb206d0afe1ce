"""Comparing packs, byte for byte, and making small ones of many frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from layerpack.convert.options import ConvertOptions


def differing(path: Path, other: Path) -> list[str]:
    """Names of the files that are not the same in both directories."""
    names = {file.name for file in path.iterdir()} | {file.name for file in other.iterdir()}
    return [
        name
        for name in sorted(names)
        if not (path / name).is_file()
        or not (other / name).is_file()
        or (path / name).read_bytes() != (other / name).read_bytes()
    ]


@contextmanager
def compressed(frame_bytes: int) -> Iterator[None]:
    """Conversions inside cut frames of so many bytes: small packs then have many of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerpack.formats.blob_writer.FRAME_BYTES", frame_bytes)
        yield


def convert_to_many_frames(source: Path, out: Path, options: ConvertOptions) -> None:
    """A conversion as any other, its frames small if it compresses. For processes of their own."""
    from layerpack.convert.api import convert

    with compressed(16384):
        convert(str(source), out, options)
