"""Whatever breaks, wherever: one clear error in bounded time, nothing left, and the next run works.

Faults of the stream alone are in test_stream.py, those of a GPU in tests/gpu/test_faults.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Disk, after_interrupt, nothing_left, threads

from layerpack.formats.errors import CapacityError, LayerpackError, StalledError, StreamError
from layerpack.formats.pack import Pack
from layerpack.formats.read import BufferedReader
from layerpack.runtime import host, measure, model, opening, stored, weights
from layerpack.runtime.generate import GenerateOptions
from layerpack.runtime.host import HostStore
from layerpack.runtime.lane import HostLane
from layerpack.runtime.mapped import map_slice
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan import Limits
from layerpack.runtime.planning import make_plan
from layerpack.runtime.resident import load_resident
from layerpack.runtime.slices import Slice, pass_slices

PackOf = Callable[..., Path]
IDS = torch.tensor([[7, 201, 33, 90, 5]])
FROM_DISK = OpenOptions(device="cpu", limits=Limits(host_slices=0), direct=False, watchdog_s=0.4)
MAPPED = OpenOptions(device="cpu", watchdog_s=0.4)
FAULTS = {
    "error": (StreamError, r"reading \d+ bytes from \d+ failed \(Input/output error, EIO\)"),
    "short": (StreamError, r"ends at byte \d+, wanted \d+ bytes .* run `layerpack verify`"),
    "death": (StreamError, r"a reader thread died: MemoryError"),
    "hang": (StalledError, r"no bytes of \w+ \d from .* the disk does not answer"),
}
faults = pytest.mark.parametrize("kind", FAULTS)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def pack(pack_of: PackOf, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(pack_of("llama"), tmp_path / "pack"))


def logits_of(pack: Path, options: OpenOptions) -> torch.Tensor:
    with Model.open(pack, options) as opened, torch.no_grad():
        found: torch.Tensor = opened.network(IDS).logits
    return found


def run(pack: Path, options: OpenOptions, begin: Callable[[str], None]) -> None:
    """Open, prefill and decode; `begin(stage)` is called as each of them begins."""
    begin("measure")
    with Model.open(pack, options) as opened:
        begin("prefill")
        passes = []

        def count(*_: object) -> None:
            passes.append(1)
            if len(passes) == 3:
                begin("decode")

        opened.network.register_forward_pre_hook(count)
        opened.generate("hello", GenerateOptions(max_new_tokens=40))


@faults
@pytest.mark.parametrize("stage", ["measure", "ring", "prefill", "decode"])
def test_a_broken_read_ends_the_run(
    pack: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, stage: str, kind: str
) -> None:
    whole = logits_of(pack, FROM_DISK)

    def planned(*arguments: Any) -> Any:
        result = make_plan(*arguments)
        begin("ring")
        return result

    def begin(now: str) -> None:
        if now == stage:
            disk.arm(kind, after={"measure": 1, "ring": 2}.get(stage, 0))

    expected, words = FAULTS[kind]
    with monkeypatch.context() as patch, nothing_left(pack):
        patch.setattr(model, "make_plan", planned)
        with pytest.raises(expected, match=words):
            run(pack, FROM_DISK, begin)
    disk.disarm()
    assert torch.equal(logits_of(pack, FROM_DISK), whole)


def load_host(slices: tuple[Slice, ...], *, may_register: bool = False) -> None:
    with closing(BufferedReader()) as reader, HostStore(torch.device("cpu")) as store:
        store.load(slices, reader, may_register=may_register, watchdog_s=0.4)


def load_vram(slices: tuple[Slice, ...]) -> None:
    with closing(BufferedReader()) as reader:
        load_resident(slices, reader, torch.device("cpu"), watchdog_s=0.4)


@faults
@pytest.mark.parametrize("load", [load_host, load_vram])
def test_a_broken_read_ends_the_loading(
    pack: Path, disk: Disk, load: Callable[[tuple[Slice, ...]], None], kind: str
) -> None:
    slices = pass_slices(Pack.open(pack))
    load(slices)
    expected, words = FAULTS[kind]
    with nothing_left(pack), pytest.raises(expected, match=words):
        disk.arm(kind, after=1)
        load(slices)
    disk.disarm()
    load(slices)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Addresses that are registered, with a device that takes them all."""
    addresses: set[int] = set()

    def register(tensor: torch.Tensor, flags: int) -> int:
        addresses.add(tensor.data_ptr())
        return 0

    monkeypatch.setattr(host, "_register", register)
    monkeypatch.setattr(host, "_unregister", addresses.remove)
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

    monkeypatch.setattr(host, "map_slice", then_truncate)
    with nothing_left(pack), pytest.raises(StreamError, match=r"layer-002.* become shorter"):
        load_host(slices, may_register=True)
    assert not registered


def test_a_mapping_that_is_not_read_in_time_stalls(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int]
) -> None:
    slices = pass_slices(Pack.open(pack))
    go_on = threading.Event()
    monkeypatch.setattr(host, "populate", lambda *_: go_on.wait(1.0))
    with nothing_left(pack), pytest.raises(StalledError, match="no bytes of layer 0"):
        load_host(slices, may_register=True)
    assert not registered


def test_registering_refused_half_way_copies_the_rest(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int]
) -> None:
    slices = pass_slices(Pack.open(pack))
    take_all = host._register
    monkeypatch.setattr(host, "_register", lambda *a: 1 if registered else take_all(*a))
    with nothing_left(pack):
        with closing(BufferedReader()) as reader, HostStore(torch.device("cpu")) as store:
            store.load(slices, reader)
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


def test_a_device_that_is_full_says_so_with_figures(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(weights, "HostLane", full)
    words = r"ran out of memory while opening the model: .* 2 slots of 45\.1 kB"
    with nothing_left(pack), pytest.raises(CapacityError, match=words):
        logits_of(pack, FROM_DISK)
    monkeypatch.undo()
    logits_of(pack, FROM_DISK)


def test_a_device_that_is_full_in_a_pass_says_so(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nothing_left(pack), Model.open(pack, FROM_DISK) as opened:

        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("injected")

        hook = opened.network.model.layers[1].mlp.register_forward_pre_hook(full)
        with pytest.raises(StreamError, match=r"ran out of memory in a pass \(injected\)"):
            opened.generate("hello")
        hook.remove()
        assert opened.generate("hello", GenerateOptions(max_new_tokens=2)).token_ids


def interrupt(*_: object, **__: object) -> Any:
    """A real Ctrl-C, from whichever thread this runs in."""
    os.kill(os.getpid(), signal.SIGINT)


OPENING = {
    "measuring": (measure, "_time_reads"),
    "taking buffers": (weights, "PinnedBuffers"),
    "mapping": (stored, "map_slice"),
    "starting the stream": (weights, "WeightStream"),
    "building the skeleton": (model, "build_skeleton"),
    "waiting for weights": (opening.Opening, "result"),
    "binding": (weights.Weights, "attach"),
}


@pytest.mark.parametrize("phase", OPENING)
def test_ctrl_c_while_opening_leaves_nothing(
    pack: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    where, name = OPENING[phase]
    options = MAPPED if phase == "mapping" else FROM_DISK
    logits_of(pack, options)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, after_interrupt(getattr(where, name)))
        with nothing_left(pack), pytest.raises(KeyboardInterrupt):
            logits_of(pack, options)
    logits_of(pack, options)


def test_ctrl_c_ends_a_long_loading(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the wait for it."""
    slices = pass_slices(Pack.open(pack))

    def slowly(cancelled: threading.Event, **_: Any) -> None:
        interrupt()
        for _round in range(1000):
            with closing(BufferedReader()) as reader, HostStore(torch.device("cpu")) as store:
                store.load(slices, reader, may_register=False, cancelled=cancelled)
                cpu = torch.device("cpu")
                load_resident(slices, reader, cpu, watchdog_s=5, cancelled=cancelled)

    monkeypatch.setattr(model, "_open_weights", slowly)
    with nothing_left(pack, within_s=10), pytest.raises(KeyboardInterrupt):
        logits_of(pack, FROM_DISK)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("options", [MAPPED, FROM_DISK], ids=["mapped", "disk"])
def test_ctrl_c_while_generating_ends_the_text(
    pack: Path, options: OpenOptions, phase: str
) -> None:
    with nothing_left(pack), Model.open(pack, options) as opened:
        whole = opened.generate("hello", GenerateOptions(max_new_tokens=8))
        calls: list[int] = []

        def count(*_: object) -> None:
            calls.append(1)
            if len(calls) == (1 if phase == "prefill" else 4):
                interrupt()

        hook = opened.network.model.layers[1].mlp.register_forward_pre_hook(count)
        broken = opened.generate("hello", GenerateOptions(max_new_tokens=8))
        hook.remove()
        assert broken.finish == "interrupted"
        assert len(broken.token_ids) == (0 if phase == "prefill" else 3)
        again = opened.generate("hello", GenerateOptions(max_new_tokens=8))
        assert again.token_ids == whole.token_ids


@pytest.mark.parametrize("name", ["stop", "_halt"])
def test_ctrl_c_while_closing_still_closes(
    pack: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from layerpack.runtime.ring import ReadRing
    from layerpack.runtime.stream import WeightStream

    kind: Any = ReadRing if name == "stop" else WeightStream
    with nothing_left(pack), pytest.raises(KeyboardInterrupt), Model.open(pack, FROM_DISK) as m:
        with torch.no_grad():
            m.network(IDS)
        monkeypatch.setattr(kind, name, after_interrupt(getattr(kind, name)))


def test_a_failed_skeleton_ends_the_loading_beside_it(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (pack / "config.json").read_text()
    (pack / "config.json").write_text(
        text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    with nothing_left(pack), pytest.raises(LayerpackError, match="describes 4 layers"):
        logits_of(pack, FROM_DISK)


def test_the_feeder_thread_is_named_when_it_dies(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nothing_left(pack), Model.open(pack, FROM_DISK) as opened, torch.no_grad():
        whole = opened.network(IDS).logits
        with monkeypatch.context() as patch:

            def die(*_: object) -> None:
                raise ZeroDivisionError("injected")

            patch.setattr(HostLane, "end_copy", die)
            with pytest.raises(StreamError, match="copying to the device failed: ZeroDivision"):
                for _ in range(3):
                    opened.network(IDS)
        assert torch.equal(opened.network(IDS).logits, whole)


def test_a_closed_model_does_not_come_back_to_life(pack: Path) -> None:
    with Model.open(pack, FROM_DISK) as opened:
        network = opened.network
    with pytest.raises(StreamError, match="the model is closed"), torch.no_grad():
        network(IDS)
    assert threads() == []


OTHER_PROCESS = """
import sys
import torch
from layerpack.formats.pack import Pack
from layerpack.runtime.measure import probe_machine
from layerpack.runtime.plan import Limits, plan_cpu
from layerpack.runtime.slices import pass_slices
from layerpack.runtime.trace import NO_TRACE
from layerpack.runtime.weights import Weights
pack, cpu = Pack.open(sys.argv[1]), torch.device("cpu")
slices = pass_slices(pack)
plan = plan_cpu(slices, machine=probe_machine(cpu, slices), limits=Limits(host_slices=1))
with Weights(pack=pack, plan=plan, device=cpu, trace=NO_TRACE) as weights:
    for number in range(100):
        for part in slices:
            with weights.use(part.index) as storage:
                assert bytes(storage[: part.length_bytes].numpy()) == part.path.read_bytes()[
                    part.offset_bytes : part.offset_bytes + part.length_bytes]
        if number == 0:
            print("running", flush=True)
            sys.stdin.readline()
"""


def test_two_processes_run_one_pack(pack: Path) -> None:
    alone = logits_of(pack, FROM_DISK)
    command = [sys.executable, "-c", OTHER_PROCESS, str(pack)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "running\n"
        with Model.open(pack, FROM_DISK) as opened, torch.no_grad():
            other.stdin.write("go on\n")
            other.stdin.flush()
            while other.poll() is None:
                assert torch.equal(opened.network(IDS).logits, alone)
        assert other.stderr is not None
        assert other.returncode == 0, other.stderr.read()
