"""A pack for the tests that break it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

PackOf = Callable[..., Path]


@pytest.fixture
def pack(pack_of: PackOf, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(pack_of("llama"), tmp_path / "pack"))
