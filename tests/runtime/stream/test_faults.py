"""What else breaks around a pack: one clear error, nothing left, and the next run works.

Broken reads are in test_broken_reads.py, faults of mapped files in test_mapped_faults.py, those of
the stream alone in test_stream_faults.py, those of a GPU in tests/gpu/test_faults.py.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.runs.cpu import FROM_DISK, IDS, MAPPED, logits_of
from support.runs.faults import nothing_left, threads

from layerpack.formats.errors import CapacityError, LayerpackError, StreamError
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.stream import store
from layerpack.runtime.stream.lane import HostLane


def test_a_device_that_is_full_says_so_with_figures(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(store, "HostLane", full)
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


@pytest.mark.parametrize("options", [MAPPED, FROM_DISK], ids=["mapped", "disk"])
def test_a_closed_model_does_not_come_back_to_life(pack: Path, options: OpenOptions) -> None:
    with Model.open(pack, options) as opened:
        network = opened.network
        unbegun = opened.stream("hello")
        begun = opened.stream("hello", GenerateOptions(max_new_tokens=200))
        assert next(begun)
    closed = functools.partial(pytest.raises, StreamError, match="the model is closed")
    with closed(), torch.no_grad():
        network(IDS)
    with closed():
        opened.generate("hello")
    with closed():
        opened.stream("hello")
    with closed():
        next(unbegun)
    del begun
    assert threads() == []


OTHER_PROCESS = """
import sys
import torch
from layerpack.formats.pack import Pack
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.measure.links import probe_machine
from layerpack.runtime.plan.plan import Limits
from layerpack.runtime.plan.policy import make_plan
from layerpack.runtime.core.slices import pass_slices
from layerpack.runtime.stream.store import Store
pack, cpu, patience = Pack.open(sys.argv[1]), torch.device("cpu"), Patience()
slices = pass_slices(pack)
machine = probe_machine(cpu, slices, patience=patience)
plan = make_plan(slices, machine=machine, limits=Limits(host_slices=1))
with Store(pack=pack, plan=plan, device=cpu, patience=patience) as store:
    for number in range(100):
        for part in slices:
            with store.use(part.index) as storage:
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
