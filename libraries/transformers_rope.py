"""transformers' rotary embeddings whose frequencies depend on how long a sequence is.

LongRoPE turns a sequence by its short factors up to the context that the model was trained with,
and by its long ones beyond; dynamic scaling stretches with every token beyond. transformers takes
the length of the pass at hand for that of the sequence. A prompt that goes in pieces would be
turned by one set of factors at its beginning and by another at its end, and what one sequence left
behind would turn the next. Here a prompt's length is known before its first piece.
Sources: LongRoPE, https://arxiv.org/abs/2402.13753; NTK-aware dynamic scaling as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerpack.libraries.torch_api import set_buffer

_LONG = "longrope"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """One table of frequencies of a module; models with several kinds of layers have several.

    `original` are those of a sequence of at most `trained_tokens`.
    """

    module: Any
    layer_type: str | None
    rope_type: str
    original: torch.Tensor
    trained_tokens: int

    def put(self, num_tokens: int) -> None:
        """The frequencies of a sequence that is so long when its first pass begins."""
        frequencies = self.original
        if num_tokens > self.trained_tokens:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            how = {} if self.layer_type is None else {"layer_type": self.layer_type}
            frequencies, _ = ROPE_INIT_FUNCTIONS[self.rope_type](
                self.module.config, self.original.device, seq_len=num_tokens, **how
            )
        self._set("inv_freq", frequencies.clone())
        if self.rope_type == _LONG:
            # A pass of fewer tokens than the sequence has chooses this one.
            self._set("original_inv_freq", frequencies)
        else:
            seen_tokens = max(num_tokens, self.trained_tokens)
            setattr(self.module, _name("max_seq_len_cached", self.layer_type), seen_tokens)

    def back(self) -> None:
        """As when the model was made."""
        self.put(0)

    def _set(self, name: str, frequencies: torch.Tensor) -> None:
        set_buffer(self.module, _name(name, self.layer_type), frequencies)


class Rope:
    """Frequencies of one network that follow the length of the sequence that it runs."""

    def __init__(self, network: nn.Module) -> None:
        self._tables = list(_tables(network))

    @property
    def follows_length(self) -> bool:
        """Whether there are any such."""
        return bool(self._tables)

    @contextmanager
    def sequence(self) -> Iterator[None]:
        """A sequence of the network begins, and ends; then all is as it was before."""
        try:
            yield
        finally:
            for table in self._tables:
                table.back()

    @contextmanager
    def prompt(self, num_tokens: int) -> Iterator[None]:
        """In the block the first `num_tokens` tokens go in, in passes of any length."""
        stretching = [table for table in self._tables if table.rope_type != _LONG]
        for table in self._tables:
            table.put(num_tokens)
        for table in stretching:
            table.module.original_max_seq_len = 0  # else a short pass would start over
        try:
            yield
        finally:
            for table in stretching:  # from here on transformers goes on by itself
                table.module.original_max_seq_len = table.trained_tokens

    def room(self, num_tokens: int) -> int | None:
        """How many more tokens a sequence of `num_tokens` takes before it must be run anew.

        None: any number. Keys that LongRoPE's short factors turned are none for the long ones.
        """
        left = [
            table.trained_tokens - num_tokens
            for table in self._tables
            if table.rope_type == _LONG and num_tokens <= table.trained_tokens
        ]
        return min(left, default=None)


def _name(name: str, layer_type: str | None) -> str:
    return name if layer_type is None else f"{layer_type}_{name}"


def _tables(network: nn.Module) -> Iterator[_Table]:
    for module in network.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if not isinstance(kind, str) or (kind != _LONG and "dynamic" not in kind):
                continue
            config: Any = module.config
            parameters = config.rope_parameters
            if layer_type is not None:
                parameters = parameters[layer_type]
            # Dynamic scaling begins where the config's own context ends, whatever it was before.
            key, default = "original_max_position_embeddings", config.max_position_embeddings
            yield _Table(
                module=module,
                layer_type=layer_type,
                rope_type=kind,
                original=getattr(module, _name("original_inv_freq", layer_type)).clone(),
                trained_tokens=int(parameters.get(key, default) if kind == _LONG else default),
            )
