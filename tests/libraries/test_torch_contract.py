"""What layerpack/libraries/torch_api.py takes from inside torch is there, and does what it did."""

from __future__ import annotations

import torch
from torch import nn

from layerpack.libraries import torch_api


def test_modules_keep_parameters_and_buffers_in_private_tables() -> None:
    """`Module._parameters` and `Module._buffers` are dictionaries that attribute access reads."""
    layer = nn.Linear(2, 2, bias=False)
    torch_api.set_parameter(layer, "weight", torch.full((3, 2), 2.0))
    assert layer.weight.shape == (3, 2) and isinstance(layer.weight, nn.Parameter)
    norm = nn.BatchNorm1d(2)
    torch_api.set_buffer(norm, "running_mean", torch.ones(2))
    assert norm.running_mean is not None and torch.equal(norm.running_mean, torch.ones(2))
    assert "running_mean" in norm.state_dict() and set(torch_api.buffers_of(norm)) == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_pinned_memory_can_be_let_go() -> None:
    """torch.accelerator.empty_host_cache, or before 2.13 torch._C._host_emptyCache."""
    assert hasattr(torch.accelerator, "empty_host_cache") or hasattr(torch._C, "_host_emptyCache")


def test_compile_can_be_left_out() -> None:
    """torch.compile is a name that decorators look up."""
    before = torch.compile
    with torch_api.uncompiled():
        assert torch.compile(len) is len
        assert torch.compile(dynamic=True)(len) is len
    assert torch.compile is before
