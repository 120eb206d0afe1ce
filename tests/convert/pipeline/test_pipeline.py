"""Stages that are slow at random, pieces of any size, many workers: never another byte."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.packs.comparing import differing

from layerpack.convert import ConvertOptions, convert
from layerpack.convert.nf4.blocks import BlockEncoder
from layerpack.convert.output.journal import Journal
from layerpack.convert.pipeline.crew import Crew
from layerpack.convert.source.directory import DirectorySource
from layerpack.formats.blob_writer import BlobWriter
from layerpack.formats.errors import SourceError

pytestmark = pytest.mark.timeout(120)

SLOW: dict[str, list[tuple[Any, str]]] = {
    "source": [(DirectorySource, "fetch"), (DirectorySource, "read"), (DirectorySource, "digest")],
    "encoder": [(BlockEncoder, "encode")],
    "destination": [(BlobWriter, "write"), (Journal, "blob")],
}
SLOW["everything"] = [where for wheres in SLOW.values() for where in wheres]


def slow_down(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seed: int) -> None:
    original, chance, lock = getattr(owner, name), random.Random(seed), threading.Lock()

    def slow(*positional: Any, **named: Any) -> Any:
        with lock:
            pause_s = 0.004 * chance.random() ** 6  # mostly none, seldom long: that reorders
        time.sleep(pause_s)
        return original(*positional, **named)

    monkeypatch.setattr(owner, name, slow)


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`in_pieces(piece_bytes, workers)` for the conversions that follow."""

    def change(piece_bytes: int, workers: int) -> None:
        monkeypatch.setattr("layerpack.convert.pipeline.weights.PIECE_BYTES", piece_bytes)
        monkeypatch.setattr("layerpack.convert.pipeline.weights.GPU_PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(
            "layerpack.convert.pipeline.pipeline.useful_workers", lambda device: workers
        )

    return change


@pytest.mark.parametrize("slow", SLOW)
def test_delays_change_nothing(
    slow: str,
    make_checkpoint: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_pieces: Callable[[int, int], None],
) -> None:
    source = make_checkpoint("llama", num_hidden_layers=4, max_shard_size="150KB")
    convert(str(source), tmp_path / "whole")
    in_pieces(7000, 5)
    for seed in range(2):
        with monkeypatch.context() as patch:
            for owner, name in SLOW[slow]:
                slow_down(patch, owner, name, seed)
            convert(str(source), tmp_path / f"out-{seed}")
        assert not differing(tmp_path / "whole", tmp_path / f"out-{seed}")


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("block_size", [32, 64, 1024])
def test_the_size_of_pieces_changes_nothing(
    checkpoint_of: Callable[..., Path],
    tmp_path: Path,
    in_pieces: Callable[[int, int], None],
    block_size: int,
    double_quant: bool,
) -> None:
    """Rows of 36 and 51 elements: a block spans rows, and weights end within one."""
    source = checkpoint_of("llama-odd")
    options = ConvertOptions(block_size=block_size, double_quant=double_quant)
    convert(str(source), tmp_path / "whole", options)
    for piece_bytes in (1, 5000):
        in_pieces(piece_bytes, 3)
        convert(str(source), tmp_path / f"{piece_bytes}", options)
        assert not differing(tmp_path / "whole", tmp_path / f"{piece_bytes}")


@pytest.mark.gpu
@pytest.mark.parametrize("piece_bytes", [1, 5000, 32 << 20])
def test_a_gpu_changes_nothing(
    checkpoint_of: Callable[..., Path],
    tmp_path: Path,
    in_pieces: Callable[[int, int], None],
    piece_bytes: int,
) -> None:
    source = checkpoint_of("llama-odd")
    convert(str(source), tmp_path / "cpu", ConvertOptions(device="cpu"))
    in_pieces(piece_bytes, 3)
    convert(str(source), tmp_path / "gpu", ConvertOptions(device="cuda"))
    assert not differing(tmp_path / "cpu", tmp_path / "gpu")


@pytest.mark.parametrize(("owner", "name"), SLOW["everything"], ids=lambda v: str(v)[-30:])
def test_an_error_in_any_stage_is_raised_as_it_is_and_leaves_no_thread(
    make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    source = make_checkpoint("llama", num_hidden_layers=4, max_shard_size="150KB")
    original, calls = getattr(owner, name), []

    def fail(*positional: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise SourceError("the third call")
        return original(*positional, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(SourceError, match="the third call"):
            convert(str(source), tmp_path / "out")
    assert not [t for t in threading.enumerate() if t.name.startswith("layerpack-")]
    assert not (tmp_path / "out").exists()
    convert(str(source), tmp_path / "out")
    convert(str(source), tmp_path / "whole")
    assert not differing(tmp_path / "whole", tmp_path / "out")


def test_the_calling_thread_takes_no_lock_that_others_wait_for(
    make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is raised in it at any instruction, also between taking a lock and using it."""
    source = make_checkpoint("llama")
    uses: list[bool] = []

    class Watched(threading.Condition):
        def __enter__(self) -> bool:
            others = [t for t in threading.enumerate() if t.name.startswith("layerpack-")]
            uses.append(bool(others) and threading.current_thread() is threading.main_thread())
            return super().__enter__()

    class WatchedCrew(Crew):
        def __init__(self) -> None:
            super().__init__()
            self.condition = Watched()

    monkeypatch.setattr("layerpack.convert.pipeline.pipeline.Crew", WatchedCrew)
    convert(str(source), tmp_path / "out")
    assert len(uses) > 100 and not any(uses)
