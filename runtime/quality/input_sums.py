"""X^T X of what goes into a layer's linear modules over many passes, and what is made of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from layerpack.formats.blob.nf4 import BLOCK_SIZES
from layerpack.formats.calibration.inputs import Inputs
from layerpack.formats.errors import CalibrationError
from layerpack.runtime.network.linear import Nf4Linear

GROUP_COLUMNS = 1024
"""Columns whose errors are put right among each other: nearly all that X^T X has (docs/log.md)."""
DAMPING = 0.3
"""Of the mean square, added to each one: a text tells less than its X^T X seems to."""
LEAST_ROWS = 1024
"""Fewer tokens say nothing of inputs: an expert's that hardly a token came to."""
_LEAST_IMPORTANCE = 1e-4  # of the mean: a column that was silent here may speak elsewhere


def linear_modules(layer: nn.Module) -> dict[str, Any]:
    """Those whose rows can be whole blocks, by their names in the layer."""
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, (Nf4Linear, nn.Linear)) and module.in_features % BLOCK_SIZES[0] == 0
    }


def sums_bytes(modules: Mapping[str, Any]) -> int:
    """The most that sums of these modules' inputs take; less where some share theirs."""
    columns = [module.in_features for module in modules.values()]
    return sum(count * min(count, GROUP_COLUMNS) * 4 for count in columns)


class LastInput:
    """What came in last: q, k and v get the same tensor, one after the other.

    It is held, so that no other gets its place meanwhile; one for all layers, as it is large.
    """

    name = ""
    tensor: torch.Tensor | None = None


class InputSums:
    """Sums for the linear modules of one layer, in host memory."""

    def __init__(self, prefix: str, modules: Mapping[str, Any]) -> None:
        """`prefix` is the layer's name in the model."""
        self._prefix, self._modules = prefix, modules
        self._orders: dict[str, torch.Tensor] = {}
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._num_rows: dict[str, int] = {}
        self.users: dict[str, str] = {}
        """Of each weight, by its name in the pack, that of its inputs."""

    @contextlib.contextmanager
    def watching(self, last: LastInput) -> Iterator[None]:
        """In the block passes of the network are added up; `last` is for all layers."""
        hooks = [
            module.register_forward_pre_hook(self._hook(f"{self._prefix}.{name}", last))
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            last.tensor = None

    def _hook(self, name: str, last: LastInput) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0]
            if last.tensor is None or last.tensor.data_ptr() != rows.data_ptr():
                last.name, last.tensor = name, rows
                self._add(name, rows.detach().flatten(0, -2))
            self.users[f"{name}.weight"] = last.name

        return hook

    def _add(self, name: str, rows: torch.Tensor) -> None:
        if not len(rows):
            return
        if name not in self._orders:
            # By the first pass, whose windows are from all over the text: groups are to hold what
            # is large together, and which of two is the larger hardly matters.
            squares = rows.float().square().mean(0)
            self._orders[name] = squares.argsort(descending=True, stable=True)
        groups = self._orders[name].split(GROUP_COLUMNS)
        own = self._sums.setdefault(name, [])
        self._num_rows[name] = self._num_rows.get(name, 0) + len(rows)
        for number, group in enumerate(groups):
            columns = rows.index_select(1, group).float()
            product = (columns.T @ columns).cpu()
            if number < len(own):
                own[number] += product
            else:
                own.append(product)

    def found(self) -> tuple[dict[str, Inputs], dict[str, str]]:
        """What is known of the inputs now, by name, and the names that weights have theirs by.

        Raises CalibrationError if some were not finite.
        """
        names = [name for name, count in self._num_rows.items() if count >= LEAST_ROWS]
        inputs = {name: self._inputs(name) for name in names}
        return inputs, {user: name for user, name in self.users.items() if name in inputs}

    def _inputs(self, name: str) -> Inputs:
        order = self._orders[name]
        num_columns = len(order)
        width = min(num_columns, GROUP_COLUMNS)
        importance = torch.empty(num_columns)
        feedback = torch.zeros(num_columns, width, dtype=torch.float16)
        squares = torch.cat([total.diagonal() for total in self._sums[name]])
        mean = squares.mean().item() or 1.0
        if not math.isfinite(mean):
            raise CalibrationError(
                f"the inputs of {name} are not finite with this text: what the pack computes there "
                "is NaN or infinite; try the text with `layerpack eval`"
            )
        importance[order.cpu()] = (squares / mean).clamp(min=_LEAST_IMPORTANCE)
        for number, total in enumerate(self._sums[name]):
            begin = number * GROUP_COLUMNS
            shares = _feedback(total.to(order.device), DAMPING * mean)
            feedback[begin : begin + len(total), : len(total)] = shares.cpu()
        return Inputs(
            importance=importance.numpy(),
            order=order.to(torch.int32).cpu().numpy(),
            feedback=feedback.numpy(),
        )


def _feedback(squares: torch.Tensor, damping: float) -> torch.Tensor:
    """What of each column's error every later one takes off: (columns, columns), float16, upper.

    Of least squares, over X^T X. Source: GPTQ, https://arxiv.org/abs/2210.17323.
    """
    hessian = squares.double()
    hessian.diagonal().add_(damping)
    upper = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True
    )
    shares: torch.Tensor = (upper / upper.diagonal()[:, None]).triu(1).half()
    return shares
