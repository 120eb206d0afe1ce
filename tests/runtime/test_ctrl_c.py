"""A real Ctrl-C while opening, loading, generating and closing leaves nothing behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs.cpu import FROM_DISK, IDS, MAPPED, logits_of
from support.runs.faults import after_interrupt, nothing_left

from layerpack.runtime import loading, opening
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.measure import links
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.stream import memory_tier, store
from layerpack.runtime.stream.ring import ReadRing
from layerpack.runtime.stream.stream import WeightStream

OPENING = {
    "measuring": (links, "_time_reads"),
    "taking buffers": (store, "PinnedBuffers"),
    "mapping": (memory_tier, "map_slice"),
    "starting the stream": (store, "WeightStream"),
    "building the skeleton": (opening, "build_skeleton"),
    "waiting for weights": (loading.Loading, "result"),
    "binding": (opening, "attach"),
}


def interrupt(*_: object, **__: object) -> Any:
    """A real Ctrl-C, from whichever thread this runs in."""
    os.kill(os.getpid(), signal.SIGINT)


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
    assert torch.empty(1).device == torch.device("cpu")
    logits_of(pack, options)


def test_ctrl_c_ends_a_long_loading(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the wait for it."""
    made = store.Store.__init__

    def slowly(self: store.Store, **how: Any) -> None:
        interrupt()
        while True:
            how["patience"].check()
            made(self, **how)
            self.__exit__(None, None, None)
            time.sleep(0.01)

    monkeypatch.setattr(store.Store, "__init__", slowly)
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
                time.sleep(0.5)  # until the waiting thread has seen it

        hook = opened.network.model.layers[1].mlp.register_forward_pre_hook(count)
        broken = opened.generate("hello", GenerateOptions(max_new_tokens=8))
        hook.remove()
        assert broken.finish == "interrupted"
        assert len(broken.token_ids) == (0 if phase == "prefill" else 3)
        assert whole.text.startswith(broken.text)
        again = opened.generate("hello", GenerateOptions(max_new_tokens=8))
        assert again.token_ids == whole.token_ids


@pytest.mark.parametrize("options", [MAPPED, FROM_DISK], ids=["mapped", "disk"])
def test_ctrl_c_at_any_moment_of_a_stream_ends_it_at_once(pack: Path, options: OpenOptions) -> None:
    wanted = GenerateOptions(max_new_tokens=200)
    with nothing_left(pack, within_s=60), Model.open(pack, options) as model:
        whole = list(model.stream("hello", GenerateOptions(max_new_tokens=5)))
        for milliseconds in range(0, 60, 4):
            timer = threading.Timer(milliseconds / 1000, interrupt)
            begin_s = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                timer.start()
                list(model.stream("hello", wanted))
                timer.join()  # the text was shorter than that
            assert time.monotonic() - begin_s < 5
        assert list(model.stream("hello", GenerateOptions(max_new_tokens=5))) == whole


def test_ctrl_c_while_a_slow_disk_is_waited_for(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer can take a second; nobody waits for the rest of the pass."""
    read = os.preadv

    def slowly(*how: Any) -> int:
        time.sleep(0.4)
        return read(*how)

    patient = OpenOptions(device="cpu", limits=FROM_DISK.limits, direct=False)
    with nothing_left(pack), Model.open(pack, patient) as model:
        monkeypatch.setattr(os, "preadv", slowly)
        threading.Timer(0.6, interrupt).start()
        begin_s = time.monotonic()
        assert model.generate("hello").finish == "interrupted"
        assert time.monotonic() - begin_s < 3
        monkeypatch.undo()


@pytest.mark.parametrize("kind", [ReadRing, WeightStream])
def test_ctrl_c_while_closing_still_closes(
    pack: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    name = "stop" if kind is ReadRing else "_halt"
    with nothing_left(pack), pytest.raises(KeyboardInterrupt), Model.open(pack, FROM_DISK) as m:
        with torch.no_grad():
            m.network(IDS)
        monkeypatch.setattr(kind, name, after_interrupt(getattr(kind, name)))
