"""Mapped files that shrink, are not read in time, or cannot be registered: named, and let go."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs.cpu import IDS, MAPPED, load_host
from support.runs.faults import nothing_left, wait_for_threads

from layerpack.formats.errors import StalledError, StreamError
from layerpack.formats.pack import Pack
from layerpack.formats.read import BufferedReader
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Slice, pass_slices
from layerpack.runtime.model import Model
from layerpack.runtime.stream import host_tier
from layerpack.runtime.stream.host_tier import HostTier
from layerpack.runtime.stream.mapped import map_slice


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Addresses that are registered, with a device that takes them all."""
    addresses: set[int] = set()

    def register(tensor: torch.Tensor, *, read_only: bool = False) -> int:
        addresses.add(tensor.data_ptr())
        return 0

    monkeypatch.setattr(host_tier, "register_host", register)
    monkeypatch.setattr(host_tier, "unregister_host", addresses.remove)
    return addresses


def test_a_file_that_shrinks_while_it_is_mapped_is_named(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int]
) -> None:
    slices = pass_slices(Pack.open(pack))
    load_host(slices, may_register=True)

    def then_truncate(part: Slice) -> torch.Tensor:
        mapped = map_slice(part)
        if part.index == 2:
            os.truncate(part.path, 4096)
        return mapped

    monkeypatch.setattr(host_tier, "map_slice", then_truncate)
    with nothing_left(pack), pytest.raises(StreamError, match=r"layer-002.* become shorter"):
        load_host(slices, may_register=True)
    assert not registered


def test_a_mapping_that_is_not_read_in_time_stalls(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int]
) -> None:
    slices = pass_slices(Pack.open(pack))
    go_on = threading.Event()
    monkeypatch.setattr(host_tier, "populate", lambda *_: go_on.wait(20.0))
    with nothing_left(pack):
        with pytest.raises(StalledError, match="no bytes of layer 0"):
            load_host(slices, may_register=True)
        go_on.set()  # what is stuck in the kernel cannot be ended; it ends by itself
        wait_for_threads()
    assert not registered


def test_registering_refused_half_way_copies_the_rest(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int]
) -> None:
    slices = pass_slices(Pack.open(pack))
    take_all: Any = getattr(host_tier, "register_host")  # noqa: B009 - imported there

    def once(tensor: torch.Tensor, *, read_only: bool = False) -> int:
        return 1 if registered else int(take_all(tensor, read_only=read_only))

    monkeypatch.setattr(host_tier, "register_host", once)
    with nothing_left(pack):
        with closing(BufferedReader()) as reader, HostTier(torch.device("cpu")) as store:
            store.load(slices, reader, patience=Patience())
            assert len(registered) == 1
            assert store.copied_bytes == sum(part.length_bytes for part in slices[1:])
            for part in slices:
                end = part.offset_bytes + part.length_bytes
                whole = part.path.read_bytes()[part.offset_bytes : end]
                assert bytes(store.tensors[part.index].numpy()) == whole
        assert not registered


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("embed.safetensors", "embedding: its mapped file cannot be read"),
        ("layer-001.safetensors", "layer 1: its mapped file cannot be read"),
        ("head.safetensors", "head 0: its mapped file cannot be read"),
    ],
)
def test_a_mapped_file_truncated_while_running_is_an_error_not_a_signal(
    pack: Path, file: str, words: str
) -> None:
    with nothing_left(pack), Model.open(pack, MAPPED) as opened, torch.no_grad():
        opened.network(IDS)
        os.truncate(pack / file, 0)
        with pytest.raises(StreamError, match=words):
            opened.network(IDS)
