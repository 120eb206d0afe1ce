"""Who proposes tokens to which request, and how many rows each may fill."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from layerpack.runtime.core.patience import Patience
from layerpack.runtime.engine.draft import Draft
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.pace import Pace
from layerpack.runtime.engine.pool import Pool
from layerpack.runtime.engine.proposers import (
    DraftProposer,
    LookupProposer,
    Proposer,
    shape_of,
)
from layerpack.runtime.engine.sampling import Sampler
from layerpack.runtime.requests.running import Running

_MOST_ROWS = 256
_MOST_DRAFTED = 4  # requests at a time, unless they ask for a draft's tokens: it serves one by one


def nodes_of(options: GenerateOptions, *, drafts: bool, free_rows: int, rows_are_free: bool) -> int:
    """The most nodes that a request's trees have."""
    lookup = options.lookup_tokens(rows_are_free=rows_are_free)
    if not drafts:
        return lookup
    if options.draft_tokens is None:
        return max(1, free_rows - 1 - lookup) + lookup
    return options.draft_tokens + lookup


class Proposing:
    """Makes each request's proposer, and shares a pass's free rows between them."""

    def __init__(
        self,
        draft: Draft | None,
        *,
        patience: Patience,
        free_rows: int,
        rows_are_free: bool,
    ) -> None:
        self._free_rows, self._rows_are_free = free_rows, rows_are_free
        self._pool: Pool | None = None
        if draft is not None:
            self._pool = Pool(draft.rows, share=False, patience=patience)

    def begin(
        self, stack: ExitStack, options: GenerateOptions, sampler: Sampler, *, most: int, nodes: int
    ) -> Proposer | None:
        """Who proposes `nodes` to a request of at most `most` tokens; goes with `stack`."""
        lookup = options.lookup_tokens(rows_are_free=self._rows_are_free)
        proposer: Proposer | None = None
        if self._pool is not None and nodes > lookup:
            shape = shape_of(nodes - lookup)
            tried = shape.levels * shape.beams
            self._pool.reserve(most + tried)
            sequence = self._pool.open((), most + tried)
            if sequence is not None:
                stack.callback(self._pool.close, sequence)
                pace = Pace() if options.draft_tokens is None else None
                proposer = DraftProposer(sequence, sampler, shape, pace)
        return LookupProposer(lookup, proposer) if lookup else proposer

    def propose(self, decoding: Sequence[Running], num_slots: int) -> bool:
        """Let each grow its tree, within the rows of a pass and free slots; whether any did.

        Raises CancelledError.
        """
        any_did = False
        left = min(num_slots, max(_MOST_ROWS, self._free_rows) - len(decoding))
        crowded = len(decoding) > _MOST_DRAFTED
        for place, running in enumerate(decoding):
            share = left // (len(decoding) - place) if left > 0 else 0
            automatic = running.answer.options.draft_tokens is None
            if share <= 0 or (crowded and automatic and self._pool is not None):
                running.skip_proposals()
                continue
            left -= len(running.propose(share))
            any_did = any_did or running.has_proposer
        return any_did
