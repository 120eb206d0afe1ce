"""Who has a network's KV slots: sequences that run, and the beginnings that are kept of ended ones.

A sequence is let in when all that it can ever need is free, so none is ever stopped for another's
sake. Beginnings that it has in common with one that runs, or ran, are shared: the bits of keys and
values depend on the tokens alone, so they are those that it would have computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerpack.runtime.core.patience import Patience
from layerpack.runtime.engine.sequence import RowSequence
from layerpack.runtime.network.row_network import RowNetwork

_LEAST_SHARED = 8
_MOST_KEPT = 64


@dataclass(slots=True, kw_only=True)
class _Guest:
    """A sequence that runs: its tokens, which grow, and how many they can become."""

    ids: Sequence[int]
    most: int


@dataclass(slots=True, kw_only=True)
class _Kept:
    """What an ended one left: the tokens, and their slots."""

    ids: list[int]
    slots: list[int]


class Pool:
    """The slots of one network, for many sequences. `share`: beginnings may be shared."""

    def __init__(self, network: RowNetwork, *, share: bool, patience: Patience) -> None:
        self._network, self._share, self._patience = network, share, patience
        self._guests: dict[RowSequence, _Guest] = {}
        self._kept: list[_Kept] = []  # the one that was of use longest ago first

    @property
    def num_spare(self) -> int:
        """Free slots that no open sequence will ever need."""
        growth = sum(guest.most - sequence.num_known for sequence, guest in self._guests.items())
        return self._network.kv.num_free - growth

    @property
    def shares(self) -> bool:
        """Whether beginnings are shared."""
        return self._share

    @property
    def num_slots(self) -> int:
        """Slots in all."""
        return self._network.kv.num_slots

    def reserve(self, num_slots: int) -> None:
        """Have at least so many slots in all, if nobody is here."""
        if not self._guests and self.num_slots < num_slots:
            self._kept.clear()  # their slots go as a whole
            self._network.reserve(num_slots)

    def num_shared(self, ids: Sequence[int]) -> int:
        """How many tokens of `ids` need not be computed again."""
        return len(self._known(ids)[0])

    def open(self, ids: Sequence[int], most: int) -> RowSequence | None:
        """A sequence that begins as `ids` does, which may grow to `most`; None: not now.

        End it with `close`.
        """
        shared, kept = self._known(ids)
        if kept is not None:
            self._kept.remove(kept)
            self._kept.append(kept)
        # It holds what it shares from here on, whatever is let go of.
        self._network.kv.share(shared)
        sequence = RowSequence(self._network, shared=shared, patience=self._patience)
        need = most - len(shared)
        droppable = sum(len(one.slots) for one in self._kept)
        while self.num_spare < need <= self.num_spare + droppable:
            gone = self._kept.pop(0)
            droppable -= len(gone.slots)
            self._network.kv.give(gone.slots)
        if self.num_spare < need:
            sequence.forget()
            return None
        self._guests[sequence] = _Guest(ids=ids, most=most)
        return sequence

    def close(self, sequence: RowSequence) -> None:
        """It ended; its tokens are kept for whoever begins alike, while there is room."""
        guest = self._guests.pop(sequence)
        sequence.keep(())
        if not self._share or not sequence.is_written or sequence.num_known < _LEAST_SHARED:
            sequence.forget()
            return
        ids = list(guest.ids[: sequence.num_known])
        for one in [one for one in self._kept if one.ids == ids[: len(one.ids)]]:
            self._kept.remove(one)
            self._network.kv.give(one.slots)
        self._kept.append(_Kept(ids=ids, slots=sequence.leave()))
        if len(self._kept) > _MOST_KEPT:
            self._network.kv.give(self._kept.pop(0).slots)

    def clear(self) -> None:
        """Nothing is kept any more."""
        for one in self._kept:
            self._network.kv.give(one.slots)
        self._kept.clear()

    def _known(self, ids: Sequence[int]) -> tuple[Sequence[int], _Kept | None]:
        """The slots of the longest beginning of `ids` that somebody has, but for its last token."""
        if not self._share:
            return (), None
        best: Sequence[int] = ()
        found, most = None, len(ids) - 1
        for sequence, guest in self._guests.items():
            count = common(ids, guest.ids, min(most, sequence.num_known))
            if count > len(best):
                best = sequence.path[:count]
        for one in self._kept:
            count = common(ids, one.ids, min(most, len(one.ids)))
            if count > len(best):
                best, found = one.slots[:count], one
        return (best, found) if len(best) >= _LEAST_SHARED else ((), None)


def common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many tokens, of the first `most`, two sequences begin alike with."""
    low, high = 0, max(0, min(most, len(one), len(other)))
    if one[:high] == other[:high]:
        return high
    while low + 1 < high:  # alike up to `low`, not up to `high`
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
