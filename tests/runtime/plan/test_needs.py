"""The estimates of memory against what a real forward pass takes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import ARCHITECTURES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerpack.formats.pack import Pack
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.needs import estimate_needs
from layerpack.runtime.plan.plan import Limits

PackOf = Callable[..., Path]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage not in self._seen:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._seen.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, size)

    def _end(self, size: int) -> None:
        self.now -= size


def cache_of(model: Model, tokens: int) -> Any:
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.network.config)
    for first in range(0, tokens, 128):
        ids = torch.randint(0, 250, (1, min(128, tokens - first)))
        model.network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cache_bytes_are_those_of_transformers_cache(pack_of: PackOf, name: str) -> None:
    path = pack_of(name)
    needs = estimate_needs(Pack.open(path), context_tokens=200)
    with Model.open(path, OpenOptions(device="cpu")) as model, torch.inference_mode():
        cache = cache_of(model, 200)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == needs.cache_bytes


@pytest.mark.parametrize(("before", "tokens"), [(0, 1), (0, 200), (199, 1), (100, 100)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pass_takes_no_more_than_estimated(
    pack_of: PackOf, name: str, before: int, tokens: int
) -> None:
    path = pack_of(name)
    needs = estimate_needs(Pack.open(path), context_tokens=before + tokens, pass_tokens=tokens)
    limits = Limits(host_slices=0)
    with (
        Model.open(path, OpenOptions(device="cpu", limits=limits)) as model,
        torch.inference_mode(),
    ):
        ids = torch.randint(0, 250, (1, tokens))
        with LiveBytes() as live:
            cache = cache_of(model, before)
            live.peak = live.now
            model.network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    assert live.peak <= needs.total_bytes
