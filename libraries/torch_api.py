"""torch: CUDA's registering of host memory, module attributes, what an import must not compile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_REGISTER_DEFAULT, _REGISTER_READ_ONLY = 0, 8


def register_host(tensor: torch.Tensor, *, read_only: bool = False) -> int:
    """Let CUDA copy from the tensor's host memory in place: CUDA's error code, 0 if it may.

    Whole pages are registered. Raises torch.AcceleratorError if the device has failed.
    """
    flags = _REGISTER_READ_ONLY if read_only else _REGISTER_DEFAULT
    code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), flags))
    if code:
        # The CUDA runtime keeps the error and hands it to the next launch: let that be this one.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        torch.cuda.synchronize()  # a device that failed refuses everything: that is no refusal
    return code


def unregister_host(address: int) -> None:
    """Undo `register_host` of the memory at `address`; nothing may be copying any more."""
    torch.cuda.cudart().cudaHostUnregister(address)


def empty_host_cache() -> None:
    """Let go of what `tensor.pin_memory()` took; before 2.13 torch has no public way."""
    empty = getattr(torch.accelerator, "empty_host_cache", None)
    if empty is None:
        empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


def empty_cublas_workspaces() -> None:
    """Let go of what cuBLAS works in, 32 MiB for each stream; there is no public way."""
    empty = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if empty is not None:
        empty()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """In the block `torch.compile` does nothing: a decorator of it imports torch's whole compiler.

    For importing a library whose compiled functions nobody here calls.
    """
    compiler = torch.compile
    torch.compile = _uncompiled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def _uncompiled(function: Any = None, **_: Any) -> Any:
    """torch.compile's two ways of being called."""
    return _uncompiled if function is None else function


def set_parameter(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Point the module's parameter `name` at `tensor`, without a look at what was there.

    Assigning an attribute takes a hundred times as long, and refuses another shape.
    """
    if not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    module._parameters[name] = tensor


def set_buffer(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Point the module's buffer `name` at `tensor`; whether it is stored stays as it was."""
    module._buffers[name] = tensor


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own buffers by name, stored ones or not; those of modules below left out."""
    return {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
