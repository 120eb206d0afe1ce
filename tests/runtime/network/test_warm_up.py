"""Getting a device ready beside other work."""

from __future__ import annotations

import threading

import pytest
import torch

from layerpack.runtime.network import warm_up
from layerpack.runtime.network.warm_up import touch_kernels, touch_linear, warming_up


def test_every_call_of_it_is_a_right_one() -> None:
    """Errors are swallowed in the thread, so here they are not."""
    touch_kernels(torch.device("cpu"))


def test_what_fails_in_it_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = threading.Event()

    def fail(device: torch.device) -> None:
        reached.set()
        raise torch.OutOfMemoryError(f"no room on {device}")

    monkeypatch.setattr(warm_up, "touch_kernels", fail)
    with warming_up(torch.device("cuda", 0)):
        assert reached.wait(10)
    assert "layerpack-warm-up" not in {thread.name for thread in threading.enumerate()}


def test_on_a_cpu_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "touch_kernels", lambda _: pytest.fail("not called"))
    with warming_up(torch.device("cpu")):
        assert "layerpack-warm-up" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.gpu
def test_it_keeps_no_memory() -> None:
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device)
    for _ in range(3):
        with warming_up(device):
            pass
        assert torch.cuda.memory_allocated(device) == before


@pytest.mark.gpu
def test_linear_layers_are_touched_without_a_trace_but_the_libraries_own() -> None:
    device, allocated = torch.device("cuda", 0), []
    for _ in range(3):
        touch_linear(device)
        allocated.append(torch.cuda.memory_allocated(device))
    assert allocated[1:] == allocated[:1] * 2  # the first may take cuBLAS' workspace
