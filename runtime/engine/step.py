"""The pass: rows in, logits out. Everything that runs the model goes through here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerpack.libraries.transformers_api import forward_arguments
from layerpack.runtime.network.row_network import RowNetwork
from layerpack.runtime.network.rows import Part


@torch.inference_mode()
def step(network: RowNetwork, parts: Sequence[Part]) -> torch.Tensor:
    """Run the parts' rows through every layer; their keys and values are in their slots then.

    Returns the logits (asked rows, vocabulary), part after part, in the model's dtype, on its
    device. A row's bits depend on the tokens that it sees alone. Orders the work and waits for
    weights. Raises StreamError.
    """
    return network.logits(parts)


@torch.inference_mode()
def plain_step(network: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The pass of a network that takes no rows: `ids` (1, tokens) behind what `cache` holds.

    Returns the logits (1, vocabulary) of the last token. Raises StreamError.
    """
    return _forward(network, ids, cache, 1)[0]


@torch.inference_mode()
def whole_step(network: Any, ids: torch.Tensor, last: int) -> torch.Tensor:
    """transformers' own forward over whole sequences `ids` (sequences, tokens), nothing kept.

    Returns the logits (sequences, last, vocabulary) of the last tokens of each. Raises StreamError.
    """
    return _forward(network, ids.to(network.device), None, last)


def _forward(network: Any, ids: torch.Tensor, cache: Any, last: int) -> torch.Tensor:
    out = network(input_ids=ids, **forward_arguments(network, cache, last))
    logits: torch.Tensor = out.logits
    return logits[:, -last:]
