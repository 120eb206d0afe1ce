"""Keys and values of tokens in slots: one slot a token, taken and given back, never copied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
        self._shared: dict[int, int] = {}  # how many have a slot beside the first one
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

    def share(self, slots: Iterable[int]) -> None:
        """One more has them, and will give them back."""
        for slot in slots:
            self._shared[slot] = self._shared.get(slot, 0) + 1

    def give(self, slots: Sequence[int]) -> None:
        """Take them back: when nobody else has one, others may write there."""
        for slot in reversed(slots):
            others = self._shared.get(slot, 0)
            if not others:
                self._free.append(slot)
            elif others == 1:
                del self._shared[slot]
            else:
                self._shared[slot] = others - 1

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
