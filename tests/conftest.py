"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_checkpoint


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint_of(name, **overrides)`: a tiny random checkpoint of tiny.ARCHITECTURES."""
    made: dict[str, Path] = {}

    def get(name: str, **overrides: Any) -> Path:
        key = name + repr(sorted(overrides.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(name), name, **overrides)
        return made[key]

    return get


@pytest.fixture(scope="session")
def pack_of(
    checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`pack_of(name, **options)`: that checkpoint converted, with fields of ConvertOptions."""
    from layerpack.convert.api import convert
    from layerpack.convert.options import ConvertOptions

    made: dict[str, Path] = {}

    def get(name: str, **options: Any) -> Path:
        key = name + repr(sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("packs") / name
            convert(str(checkpoint_of(name)), out, ConvertOptions(**options))
            made[key] = out
        return made[key]

    return get
