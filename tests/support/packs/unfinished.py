"""Conversions that are stopped in the middle, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerpack.convert import ConvertOptions, convert
from layerpack.convert.output.journal import read_journal


class StopError(Exception):
    """Raised by a progress callback: the work ends in the middle."""


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".layerpack-partial")


def run_until(source: Path | str, out: Path, share: float, **options: Any) -> None:
    """Convert, but stop with an error after `share` of the bytes."""

    def progress(done_bytes: int, total_bytes: int) -> None:
        if done_bytes >= share * total_bytes:
            raise StopError

    with pytest.raises(StopError):
        convert(str(source), out, ConvertOptions(**options), progress)


def stamps(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of each blob that the journal calls done."""
    done = read_journal(partial_of(out) / "journal").blobs
    files = {name: partial_of(out) / "pack" / name for name in done}
    return {name: (f.stat().st_ino, f.stat().st_mtime_ns) for name, f in files.items()}
