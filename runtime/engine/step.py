"""The pass: tokens in, logits out. Everything that runs the model goes through here."""

from __future__ import annotations

from typing import Any

import torch

from layerpack.libraries.transformers_api import forward_arguments


@torch.inference_mode()
def step(network: Any, ids: torch.Tensor, cache: Any, *, rows: int = 1) -> torch.Tensor:
    """Run `ids` (1, tokens) through every layer, behind what `cache` holds and into it.

    Returns the logits (rows, vocabulary) of the last `rows` tokens, in the model's dtype, on its
    device. Orders the work and waits for weights alone. Raises StreamError.
    """
    out = network(input_ids=ids, **forward_arguments(network, cache, rows))
    logits: torch.Tensor = out.logits
    return logits[0, -rows:]
