"""Embedding rows give what the whole embedding gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerpack.runtime.network.embedding import EmbeddingRows


@pytest.mark.parametrize("padding", [None, 7])
def test_rows_equal_the_whole_embedding(padding: int | None) -> None:
    torch.manual_seed(0)
    whole = nn.Embedding(50, 8, padding_idx=padding)
    ids = torch.tensor([[1, 49, 7], [7, 7, 0]])
    expected = whole(ids)
    rows = nn.Embedding(50, 8, padding_idx=padding, device="meta")
    EmbeddingRows(rows, whole.weight.detach(), torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(rows(ids), expected)
