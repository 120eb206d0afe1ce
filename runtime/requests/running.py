"""A request that was let in: its tokens so far, who proposes more, what becomes of its logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from layerpack.runtime import generate
from layerpack.runtime.engine.proposers import Proposer
from layerpack.runtime.engine.sampling import Sampler, Token
from layerpack.runtime.engine.sequence import PlainSequence, RowSequence
from layerpack.runtime.engine.text_sink import TextSink
from layerpack.runtime.engine.tree import Tree, follow
from layerpack.runtime.generate import Generation
from layerpack.runtime.requests.answer import Answer, Piece
from layerpack.runtime.trace.steps import Pass


class Running:
    """One sequence. `most` is the length at which it ends, prompt included."""

    def __init__(
        self,
        answer: Answer,
        *,
        ids: list[int],
        most: int,
        ends: set[int],
        sampler: Sampler,
        tokenizer: Any,
        sequence: RowSequence | PlainSequence,
        proposer: Proposer | None,
    ) -> None:
        self.answer, self.ids, self.sequence = answer, ids, sequence
        self._prompt_tokens, self._most, self._ends = len(ids), most, ends
        self._known_before = sequence.num_known
        self._sampler, self._proposer = sampler, proposer
        self.on_end: Callable[[], object] = lambda: None
        """Gives back what it has."""
        self._sink = TextSink(tokenizer, answer.options.stop)
        self._tokens: list[Token] = []
        self._tree = Tree()
        self._passes: list[Pass] = []
        self._begin_s = time.perf_counter()
        self._finish: str | None = None

    @property
    def num_missing(self) -> int:
        """Tokens that are not in the KV cache: 1 once the prompt is."""
        return len(self.ids) - self.sequence.num_known

    @property
    def is_decoding(self) -> bool:
        """Whether its prompt has been run."""
        return len(self.ids) > self._prompt_tokens

    @property
    def has_proposer(self) -> bool:
        """Whether it may try tokens."""
        return self._proposer is not None

    def propose(self, most_nodes: int) -> Tree:
        """The tree for its next pass, of at most so many nodes. Raises CancelledError."""
        self._tree = Tree()
        left = self._most - len(self.ids) - 1
        room = self.sequence.room(len(self.ids))
        if room is not None:
            left = min(left, room)
        if self._proposer is not None and self.is_decoding and most_nodes > 0:
            self._tree = self._proposer.propose(self.ids, left, most_nodes)
        return self._tree

    def skip_proposals(self) -> None:
        """Its next pass has none."""
        self._tree = Tree()

    @property
    def tree(self) -> Tree:
        """What was proposed last."""
        return self._tree

    def ran(self, begin_s: float, num_rows: int) -> None:
        """A pass that began at `begin_s` had so many rows of it, and is over."""
        seconds = time.perf_counter() - begin_s
        self._passes.append(Pass(seconds=seconds, num_tokens=num_rows))

    def take(self, logits: torch.Tensor, best: Sequence[int]) -> int:
        """The tokens that the logits of its last token and its nodes give; how many.

        `best` are the likeliest tokens of the rows.
        """
        choose = self._sampler.chooser(logits, best, self.ids, self._prompt_tokens)
        new, right = follow(self._tree, choose)
        self.sequence.keep(right)
        if self._proposer is not None and len(self._tree):
            self._proposer.accepted(right)
        for place, token in enumerate(new):
            if token in self._ends:
                new, self._finish = new[: place + 1], "stop"
                break
        self.ids += new
        tokens = choose.tokens[: len(new)]
        self._tokens += tokens
        text = self._sink.put(new)
        if self._sink.stopped:
            self._finish = "stop"
        elif self._finish is None and len(self.ids) >= self._most:
            self._finish = "length"
        if self._finish is not None and not self._sink.stopped:
            text += self._sink.rest()
        self.answer.put(Piece(text, tokens))
        return len(new)

    @property
    def is_over(self) -> bool:
        """Whether it has ended by itself."""
        return self._finish is not None

    def end(self, peak_vram_bytes: int) -> None:
        """Give back what it has, and the answer; "interrupted" if it has not ended by itself."""
        self.on_end()
        ran = self._prompt_tokens - self._known_before
        decode_passes, num_proposed = generate.count_proposed(self._passes, ran)
        if self._finish is None and not self.answer.is_over:
            self.answer.put(Piece(self._sink.rest()))
        self.answer.end(
            Generation(
                text=self._sink.text,
                token_ids=tuple(self._sink.token_ids),
                tokens=tuple(self._tokens),
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._known_before,
                finish=self._finish or "interrupted",
                seed=self._sampler.seed,
                passes=len(self._passes),
                decode_passes=decode_passes,
                proposed_tokens=num_proposed,
                seconds=time.perf_counter() - self._begin_s,
                first_pass_s=self._passes[0].seconds if self._passes else 0.0,
                peak_vram_bytes=peak_vram_bytes,
            )
        )

    @staticmethod
    def given_up(answer: Answer, prompt_tokens: int) -> None:
        """An answer that nobody wanted any more before it began."""
        answer.end(
            Generation(
                text="",
                token_ids=(),
                tokens=(),
                prompt_tokens=prompt_tokens,
                cached_tokens=0,
                finish="interrupted",
                seed=answer.options.seed,
                passes=0,
                decode_passes=0,
                proposed_tokens=0,
                seconds=0.0,
                first_pass_s=0.0,
                peak_vram_bytes=0,
            )
        )

    def fail(self, error: Exception) -> None:
        """Give back what it has; the answer ends in `error`."""
        self.on_end()
        self.answer.end(error)
