"""On a CUDA device: Ctrl-C while opening, in a pass and while closing; nothing stays behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from support.runs.cuda import logits_of, options, tiers
from support.runs.faults import after_interrupt, nothing_left

from layerpack.runtime import loading, opening
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.model import Model
from layerpack.runtime.stream import host_tier, store

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("same_vram_after")]

PHASES = {
    "pinning": (store, "PinnedBuffers", "disk"),
    "registering": (host_tier, "register_host", "host"),
    "loading residents": (store, "load_vram", "VRAM"),
    "building the skeleton": (opening, "build_skeleton", "mixed"),
    "waiting for weights": (loading.Loading, "result", "mixed"),
    "binding": (opening, "attach", "mixed"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_while_opening_leaves_nothing(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int], phase: str
) -> None:
    where, name, tier = PHASES[phase]
    whole = logits_of(pack, options(tier))
    with monkeypatch.context() as patch, nothing_left(pack, within_s=60):
        patch.setattr(where, name, after_interrupt(getattr(where, name)))
        with pytest.raises(KeyboardInterrupt):
            logits_of(pack, options(tier))
    assert not registered
    assert torch.equal(logits_of(pack, options(tier)), whole)


@tiers
def test_ctrl_c_in_a_pass_and_while_closing(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int], tier: str
) -> None:
    wanted = GenerateOptions(max_new_tokens=6, raw=True)
    with (
        nothing_left(pack, within_s=60),
        pytest.raises(KeyboardInterrupt),
        Model.open(pack, options(tier)) as opened,
    ):
        whole = opened.generate("hello", wanted).token_ids
        calls: list[int] = []

        def count(*_: object) -> None:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)  # until the waiting thread has seen it

        # Of a pass that was recorded this is all that Python sees.
        hook = opened.network.get_input_embeddings().register_forward_pre_hook(count)
        broken = opened.generate("hello", wanted)
        hook.remove()
        assert broken.finish == "interrupted"
        assert broken.token_ids == whole[: len(broken.token_ids)]
        assert opened.generate("hello", wanted).token_ids == whole
        closed = after_interrupt(store.Store.__exit__)
        monkeypatch.setattr(store.Store, "__exit__", closed)
    assert not registered
