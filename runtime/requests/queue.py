"""Requests that wait, in the order in which they came."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from layerpack.formats.errors import LayerpackError, StreamError
from layerpack.formats.text import first_line
from layerpack.runtime.engine.prompt import encode_prompt, tokens_left
from layerpack.runtime.opening import Opened
from layerpack.runtime.requests.answer import Answer
from layerpack.runtime.requests.bounds import Bounds
from layerpack.runtime.requests.proposing import nodes_of
from layerpack.runtime.requests.running import Running


@dataclass(slots=True, kw_only=True)
class Waiting:
    """A request as tokens; it ends at `most` of them, and tries up to `nodes` more in a pass."""

    answer: Answer
    ids: list[int]
    most: int
    nodes: int


class Queue:
    """`put` from any thread; all else in the one that runs the passes."""

    def __init__(self, model: Opened, bounds: Bounds) -> None:
        self._model, self._bounds = model, bounds
        self._arrived: SimpleQueue[Answer] = SimpleQueue()
        self._waiting: deque[Waiting] = deque()

    def put(self, answer: Answer) -> None:
        """A request; waits not."""
        self._arrived.put(answer)

    @property
    def num_waiting(self) -> int:
        """Requests that are not let in yet, those that nobody has read included. Any thread."""
        return len(self._waiting) + self._arrived.qsize()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def first(self) -> Waiting:
        """Who is let in next."""
        return self._waiting[0]

    def take_first(self) -> None:
        """The first one is let in."""
        self._waiting.popleft()
        self.tell_places()

    def tell_places(self) -> None:
        """Let each answer know how many are before it, itself counted."""
        for place, waiting in enumerate(self._waiting, start=1):
            waiting.answer.place = place

    def look(self) -> None:
        """Read what has arrived; end what nobody wants any more."""
        with contextlib.suppress(Empty):
            while True:
                self._read(self._arrived.get_nowait())
        for waiting in [one for one in self._waiting if one.answer.is_cancelled]:
            self._waiting.remove(waiting)
            Running.given_up(waiting.answer, len(waiting.ids))
        self.tell_places()

    def refuse(self, error: Exception) -> None:
        """Whoever is here ends in `error`."""
        with contextlib.suppress(Empty):
            while True:
                self._arrived.get_nowait().end(copy.copy(error))
        while self._waiting:
            self._waiting.popleft().answer.end(copy.copy(error))

    def wanted_slots(self) -> int:
        """As many as memory was set aside for; enough for the first one."""
        first = self.first
        return max(first.most, self._bounds.kv_tokens) + first.nodes

    def _read(self, answer: Answer) -> None:
        try:
            self._waiting.append(self._waiting_for(answer))
        except LayerpackError as error:
            answer.end(error)
        except Exception as error:  # a tokenizer's own
            answer.end(StreamError(f"the prompt cannot be read ({first_line(error)})"))

    def _waiting_for(self, answer: Answer) -> Waiting:
        options = answer.options
        rows = int(self._model.network.get_input_embeddings().num_embeddings)
        ids = encode_prompt(
            self._model.need_tokenizer(), answer.prompt, options, embedding_rows=rows
        )
        most = len(ids) + tokens_left(
            len(ids),
            options.max_new_tokens,
            limit=self._bounds.context,
            reserved=self._bounds.reserved,
        )
        nodes = 0
        if self._model.rows is not None:
            nodes = nodes_of(
                options,
                drafts=self._model.draft is not None,
                free_rows=self._bounds.free_rows,
                rows_are_free=self._bounds.rows_are_free,
            )
        return Waiting(answer=answer, ids=ids, most=most, nodes=nodes)
