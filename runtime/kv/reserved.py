"""A KV cache with its whole memory taken in the first pass, and filled in place.

transformers' own grows by concatenation: each token copies every layer's keys and values into a
new, slightly larger allocation. Beside resident weights that leaves the VRAM in pieces, and a run
that fitted at its start can die of memory half way. Here a run that fits in its first pass fits to
its end. What attention sees are the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


def reserved_cache(config: Any, max_tokens: int) -> DynamicCache:
    """transformers' cache for a model of this config, its full-attention layers reserved.

    Layers with a sliding window stay as they are: they are bounded already. A run of more than
    `max_tokens` goes on by concatenation.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        ReservedLayer(max_tokens) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """`keys` and `values` (batch, heads, tokens, head_dim) are views of the two reserves' front."""

    is_initialized: bool

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self._max_tokens = max_tokens
        self._reserves: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new keys and values (batch, heads, new tokens, head_dim); all of them."""
        if not self.is_initialized:
            self._initialise(key_states, value_states)
        first = self.get_seq_length()
        end = first + key_states.shape[-2]
        if not self._in_place() or end > self._max_tokens:
            self._reserves = None
            whole: tuple[torch.Tensor, torch.Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            return whole
        assert self._reserves is not None
        for reserve, states in zip(self._reserves, (key_states, value_states), strict=True):
            reserve[..., first:end, :] = states
        self.keys, self.values = (reserve[..., :end, :] for reserve in self._reserves)
        return self.keys, self.values

    def _initialise(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._reserves = (self._reserve(key_states), self._reserve(value_states))
        self.keys, self.values = (reserve[..., :0, :] for reserve in self._reserves)
        self.is_initialized = True

    def _reserve(self, states: torch.Tensor) -> torch.Tensor:
        shape = (*states.shape[:-2], self._max_tokens, states.shape[-1])
        return torch.empty(shape, dtype=states.dtype, device=states.device)

    def _in_place(self) -> bool:
        # Whoever reorders or repeats a batch puts new tensors in place of the views.
        return self._reserves is not None and all(
            view.untyped_storage().data_ptr() == reserve.untyped_storage().data_ptr()
            and view.stride() == reserve.stride()
            for view, reserve in zip((self.keys, self.values), self._reserves, strict=True)
        )
