"""The input embedding: a pass needs as many of its rows as it has tokens, and reads no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layerpack.formats.pack import Pack
from layerpack.libraries.torch_api import set_parameter
from layerpack.runtime.network.bind import view_tensor
from layerpack.runtime.stream.mapped import populate
from layerpack.runtime.stream.memory_tier import tensor_bytes


class EmbeddingRows:
    """Feeds an embedding module the rows of the tokens at hand, from a mapped file.

    The module keeps its own forward (some models scale in it); it sees a weight of as many rows
    as there are tokens, and positions in it for ids.
    """

    def __init__(self, module: nn.Module, matrix: torch.Tensor, device: torch.device) -> None:
        self._matrix = matrix
        self._device = device
        empty = torch.empty((1, matrix.shape[1]), dtype=matrix.dtype, device=device)
        set_parameter(module, "weight", empty)
        # Only gradients know it, and it may lie beyond the few rows that a pass sees.
        module.padding_idx = None  # type: ignore[assignment]
        module.register_forward_pre_hook(self._gather)

    def _gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        tokens = ids.reshape(-1).cpu()
        for token in tokens.unique().tolist():
            populate(self._matrix[token].view(torch.uint8), "embedding")
        rows = self._matrix[tokens].to(self._device)
        set_parameter(module, "weight", rows)
        places = torch.arange(rows.shape[0], device=self._device).view(ids.shape)
        return (places, *args[1:])


def embedding_matrix(pack: Pack) -> torch.Tensor:
    """The embedding (vocabulary, hidden), mapped. Raises StreamError."""
    blob = pack.manifest.embedding
    entry = blob.tensor(pack.manifest.model.embedding)
    return view_tensor(tensor_bytes(pack, blob, entry), entry, entry.offset_bytes)
