"""Fixtures that several folders of tests share."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from smollm2_gguf import fetch_gguf
from support.models import smollm2
from support.models.tiny import make_checkpoint

CACHE = Path(__file__).parent.parent / ".cache"
"""What is slow to fetch or make and the same each time; `make clean` removes it."""

# No bar or notice of a library belongs into a test's output.
os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# A shell that starts the suite with `&` has it ignore Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))


@pytest.fixture(scope="session", autouse=True)
def own_cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measurements made while tests compete are not those that the user's runs should plan by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        yield


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


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1, 98 MB), downloaded once."""
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "gguf.lock"):
        return fetch_gguf(CACHE)


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_gguf: Path) -> Path:
    """SmolLM2-135M-Instruct as a plain bf16 checkpoint directory, made once."""
    path = CACHE / "smollm2-135m-instruct"
    with FileLock(CACHE / "checkpoint.lock"):
        if not path.exists():
            smollm2.make_checkpoint(smollm2_gguf, path)
    return path
