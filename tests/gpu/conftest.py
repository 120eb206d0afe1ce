"""A pack with large layers, and what must not stay registered or allocated after a test of it."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.runs.cuda import logits_of, options

from layerpack.formats.units import MIB
from layerpack.libraries.torch_api import (
    empty_cublas_workspaces,
    register_host,
    unregister_host,
)
from layerpack.runtime.stream import host_tier, pinned


@pytest.fixture(scope="module")
def made(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack whose layers are too large for torch's pool of small blocks."""
    from layerpack.convert.api import convert
    from layerpack.convert.options import ConvertOptions

    source = checkpoint_of("llama", hidden_size=1024, intermediate_size=6144)
    out = tmp_path_factory.mktemp("packs") / "large"
    convert(str(source), out, ConvertOptions())
    logits_of(out, options("mixed"))  # cuBLAS takes its workspace for good
    return out


@pytest.fixture
def pack(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "pack"))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Addresses that are registered with CUDA, really."""
    addresses: set[int] = set()

    def note(tensor: torch.Tensor, *, read_only: bool = False) -> int:
        code = register_host(tensor, read_only=read_only)
        if not code:
            addresses.add(tensor.data_ptr())
        return code

    def forget(address: int) -> None:
        unregister_host(address)
        addresses.remove(address)

    for room in (host_tier, pinned):
        monkeypatch.setattr(room, "register_host", note)
        monkeypatch.setattr(room, "unregister_host", forget)
    return addresses


@pytest.fixture
def same_vram_after(made: Path) -> Iterator[None]:
    """Every test gives back what it took."""
    gc.collect()
    torch.cuda.synchronize()
    empty_cublas_workspaces()
    before = torch.cuda.memory_allocated()
    yield
    gc.collect()
    torch.cuda.synchronize()
    empty_cublas_workspaces()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2 * MIB
