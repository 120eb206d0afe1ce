"""Keys and values of tokens in slots: one slot a token, taken and given back, never copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerpack.formats.errors import CapacityError

Pair = tuple[torch.Tensor, torch.Tensor]


class KvSlots:
    """`num_slots` slots on `device`, in every layer of one network.

    A layer's memory is taken when it first writes. Slots hold zeros or what was written: all is
    finite, as what is masked still goes through the arithmetic. `nobodys` is one slot more, for
    rows that fill up a table.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.num_slots, self.nobodys, self._device = num_slots, num_slots, device
        self._free = list(range(num_slots - 1, -1, -1))
        self._layers: dict[tuple[int, int], Pair] = {}

    @property
    def num_free(self) -> int:
        """How many slots may be taken."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many slots. Raises CapacityError if there are fewer."""
        if count > len(self._free):
            raise CapacityError(
                f"{count} more tokens for a KV cache of {self.num_slots} with {len(self._free)} "
                "left; raise --context"
            )
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def give(self, slots: Sequence[int]) -> None:
        """Take them back: others may write there."""
        self._free += reversed(slots)

    def write(
        self,
        layer: tuple[int, int],
        slots: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> Pair:
        """Put the rows of keys and values (rows, KV heads, size) into `slots`; all of the layer.

        `layer` is its number, and which of its attentions it is.
        """
        pair = self._layers.get(layer)
        if pair is None:
            pair = self._layers[layer] = (self._room(keys), self._room(values))
        pair[0].index_copy_(0, slots, keys)
        pair[1].index_copy_(0, slots, values)
        return pair

    def _room(self, rows: torch.Tensor) -> torch.Tensor:
        shape = (self.num_slots + 1, *rows.shape[1:])
        return torch.zeros(shape, dtype=rows.dtype, device=self._device)
