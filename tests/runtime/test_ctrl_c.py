"""A real Ctrl-C while opening, loading, generating and closing leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs.cpu import FROM_DISK, IDS, MAPPED, logits_of
from support.runs.faults import after_interrupt, nothing_left
from torch import overrides

from layerpack.formats.pack import Pack
from layerpack.formats.read import BufferedReader
from layerpack.runtime import loading as opening
from layerpack.runtime import model
from layerpack.runtime.core.interrupts import deferred_interrupts
from layerpack.runtime.core.slices import pass_slices
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.measure import links as measure
from layerpack.runtime.model import Model
from layerpack.runtime.network import weights
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.stream import stored
from layerpack.runtime.stream.host import HostStore
from layerpack.runtime.stream.resident import load_resident


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


def test_ctrl_c_does_not_leave_torch_on_the_meta_device(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its skeleton is built torch takes the device off its stack and puts it back again."""
    with monkeypatch.context() as patch:
        patch.setattr(overrides, "_push_mode", after_interrupt(overrides._push_mode))
        with pytest.raises(KeyboardInterrupt):
            logits_of(pack, FROM_DISK)
    assert torch.empty(1).device == torch.device("cpu")
    logits_of(pack, FROM_DISK)


EACH_LINE = """
import os, signal, sys, time, threading
from pathlib import Path
from support.runs.cpu import FROM_DISK
from support.runs.faults import threads
from layerpack.runtime import GenerateOptions, Model
from layerpack.runtime.stream import stream
from layerpack.runtime.engine import text_stream

def trace(frame, event, _):
    name = frame.f_code.co_filename
    inside = name in (stream.__file__, text_stream.__file__, threading.__file__)
    return counted if inside and armed else None

def counted(frame, event, _):
    global count
    if event == "return":  # an error that is raised there, as by no real Ctrl-C, skips `finally`
        return counted
    count += armed
    if count == wanted:
        os.kill(os.getpid(), signal.SIGINT)
    return counted

armed, count, wanted, ended = False, 0, 0, 0
with Model.open(sys.argv[1], FROM_DISK) as model:
    whole = list(model.stream("hello", GenerateOptions(max_new_tokens=2)))
    for way in (model.generate, lambda *them: list(model.stream(*them))):
        for wanted in range(1, 10_000, 7):
            begin_s, count, armed = time.monotonic(), 0, True
            try:
                sys.settrace(trace)
                way("hello", GenerateOptions(max_new_tokens=2))
            except KeyboardInterrupt:
                pass
            finally:
                armed = False
                sys.settrace(None)
            assert time.monotonic() - begin_s < 10, wanted
            assert "layerpack-generate" not in threads(), wanted
            if count < wanted:
                break
            ended += 1
    assert list(model.stream("hello", GenerateOptions(max_new_tokens=2))) == whole
print("ended", ended, threads())
"""


def test_ctrl_c_at_any_line_of_a_stream_ends_it_at_once(pack: Path) -> None:
    """Not when a thread that waits for a lock is given up, half a minute later."""
    done = subprocess.run(
        [sys.executable, "-c", EACH_LINE, str(pack)],
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    ended, left = done.stdout.split(maxsplit=2)[1:]
    assert int(ended) > 30 and left == "[]\n"


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


def test_ctrl_c_as_closing_begins_still_closes(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is held back."""
    with nothing_left(pack), pytest.raises(KeyboardInterrupt), Model.open(pack, FROM_DISK) as m:
        with torch.no_grad():
            m.network(IDS)
        monkeypatch.setattr(opening, "deferred_interrupts", after_interrupt(deferred_interrupts))


@pytest.mark.parametrize("name", ["layerpack-open", "layerpack-read-0", "layerpack-generate"])
def test_ctrl_c_while_a_thread_begins_ends_it(
    pack: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It has no identity yet by which whoever closes could know that it runs."""
    wait = threading.Event.wait

    def interrupted(self: threading.Event, timeout: float | None = None) -> bool:
        if self is started[-1]:
            started.append(threading.Event())
            interrupt()
        return wait(self, timeout)

    started: list[threading.Event] = [threading.Event()]
    start = threading.Thread.start

    def noted(self: threading.Thread) -> None:
        if self.name == name and len(started) == 1:
            started.append(self._started)  # type: ignore[attr-defined]
        start(self)

    logits_of(pack, FROM_DISK)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", noted)
        patch.setattr(threading.Event, "wait", interrupted)
        with nothing_left(pack), pytest.raises(KeyboardInterrupt), Model.open(pack, FROM_DISK) as m:
            list(m.stream("hello", GenerateOptions(max_new_tokens=100)))


@pytest.mark.parametrize("name", ["stop", "_halt"])
def test_ctrl_c_while_closing_still_closes(
    pack: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from layerpack.runtime.stream.ring import ReadRing
    from layerpack.runtime.stream.stream import WeightStream

    kind: Any = ReadRing if name == "stop" else WeightStream
    with nothing_left(pack), pytest.raises(KeyboardInterrupt), Model.open(pack, FROM_DISK) as m:
        with torch.no_grad():
            m.network(IDS)
        monkeypatch.setattr(kind, name, after_interrupt(getattr(kind, name)))
