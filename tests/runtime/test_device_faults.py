"""A device that fails, and every call after it: one clear error, and all is closed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs.faults import break_lane, fail, nothing_left

from layerpack.formats.errors import StreamError
from layerpack.formats.read import BufferedReader
from layerpack.runtime import opening
from layerpack.runtime.bench import row as bench_runner
from layerpack.runtime.bench.options import BenchOptions
from layerpack.runtime.bench.report import LeftOut, RowResult
from layerpack.runtime.bench.run import run_bench
from layerpack.runtime.core.device_errors import device_errors
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Extent
from layerpack.runtime.engine.draft import load_draft
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.measure import links as measure
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits
from layerpack.runtime.stream import store
from layerpack.runtime.stream.lane import EventFence, HostLane
from layerpack.runtime.stream.ring import ReadRing

PackOf = Callable[..., Path]
CPU = torch.device("cpu")
FROM_DISK = OpenOptions(device="cpu", limits=Limits(host_slices=0), direct=False, watchdog_s=2.0)
LINE = r"^the device failed {} \(CUDA error: unspecified launch failure\); start .* \(dmesg\)$"


@pytest.fixture
def pack(pack_of: PackOf) -> Path:
    return pack_of("llama")


@pytest.mark.parametrize("after", [0, 9])
@pytest.mark.parametrize("call", ["begin_copy", "copy", "end_copy", "fence"])
def test_a_device_that_fails_in_a_copy(
    pack: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    with (
        nothing_left(pack),
        pytest.raises(StreamError, match=LINE.format(r"in a (copy|pass)")),
        Model.open(pack, FROM_DISK) as opened,
    ):
        break_lane(monkeypatch, call, after)
        opened.generate("hello", GenerateOptions(max_new_tokens=20))


@pytest.mark.parametrize("after", [0, 9])
@pytest.mark.parametrize("call", ["wait_ready", "mark_free"])
def test_a_device_that_fails_in_a_pass(
    pack: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    with (
        nothing_left(pack),
        pytest.raises(StreamError, match=LINE.format("in a pass")),
        Model.open(pack, FROM_DISK) as opened,
    ):
        break_lane(monkeypatch, call, after)
        list(opened.stream("hello", GenerateOptions(max_new_tokens=20)))


def test_a_failed_device_is_told_again_in_the_next_pass(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nothing_left(pack), Model.open(pack, FROM_DISK) as opened:
        break_lane(monkeypatch, "wait_ready", 1)
        for _ in range(2):
            with pytest.raises(StreamError, match=LINE.format(r"in a (copy|pass)")):
                opened.generate("hello", GenerateOptions(max_new_tokens=2))


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (measure, "pick_threads"),
        (opening, "plan_for"),
        (store, "HostLane"),
        (opening, "build_skeleton"),
        (opening, "attach"),
    ],
)
def test_a_device_that_fails_while_opening(
    pack: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    monkeypatch.setattr(HostLane, "drain", fail)
    monkeypatch.setattr(where, name, fail)
    with (
        nothing_left(pack),
        pytest.raises(StreamError, match=LINE.format("while (opening the model|it was measured)")),
        Model.open(pack, FROM_DISK),
    ):
        pass


def test_a_device_that_fails_while_its_link_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(StreamError, match=LINE.format("while its link was measured")):
        measure.measure_link(CPU)


def test_a_device_that_fails_is_no_damaged_draft(
    checkpoint_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", fail)
    with pytest.raises(torch.AcceleratorError):
        load_draft(str(checkpoint_of("llama")), device=torch.device("meta"), dtype=torch.float32)


class FailingEvent:
    """A CUDA event of a device that has failed."""

    def synchronize(self) -> None:
        fail()


def test_a_reader_that_waits_for_a_failed_device_says_so(pack: Path) -> None:
    path = pack / "layer-000.safetensors"
    with nothing_left(pack), closing(BufferedReader()) as reader:
        ring = ReadRing(
            buffers=[memoryview(bytearray(64))],
            reader=reader,
            extent_of=lambda _: Extent(title="layer 0", path=path, offset_bytes=0, length_bytes=64),
            num_threads=1,
        )
        with ring:
            ring.take(Patience(5))
            event: Any = FailingEvent()
            ring.release(EventFence(event))
            with pytest.raises(StreamError, match=LINE.format("in a copy")):
                ring.take(Patience(5))


def test_a_device_that_fails_in_a_row_of_the_bench_leaves_the_row_out(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[RowResult | LeftOut] = []
    monkeypatch.setattr(bench_runner, "time_passes", fail)
    options = BenchOptions(device="cpu", context_tokens=4, rows=("host",))
    report = run_bench(pack, options, on_outcome=told.append)
    (row,) = report.left_out
    assert told == [row]
    assert row.reason.startswith("the device failed in this row (CUDA error: unspecified")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("CUDA error: out of memory\nmore", r"ran out of memory in a test \(CUDA error: out"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling it", r"ran out .* lower --vram"),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling it", r"failed in a test .*dmesg"),
    ],
)
def test_cublas_and_the_driver_speak_of_memory_in_their_own_words(words: str, line: str) -> None:
    with pytest.raises(StreamError, match=line), device_errors("in a test"):
        raise RuntimeError(words)


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("shapes differ"), NotImplementedError("CUDA error: none")):
        with pytest.raises(type(error)) as caught, device_errors("in a test"):
            raise error
        assert caught.value is error
