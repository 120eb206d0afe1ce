"""From a prompt to text: pass after pass, with tokens that somebody proposed in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from layerpack.formats.errors import StreamError
from layerpack.formats.text import first_line
from layerpack.runtime.core.device_errors import device_errors
from layerpack.runtime.core.patience import CancelledError, Patience
from layerpack.runtime.engine.draft import Draft
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.pace import Pace
from layerpack.runtime.engine.prompt import Message, encode_prompt, tokens_left
from layerpack.runtime.engine.proposers import (
    DraftProposer,
    LookupProposer,
    Proposer,
    shape_of,
)
from layerpack.runtime.engine.sampling import Sampler
from layerpack.runtime.engine.sequence import AnySequence, PlainSequence, RowSequence
from layerpack.runtime.engine.text_sink import TextSink
from layerpack.runtime.engine.tree import Tree, follow
from layerpack.runtime.network.row_network import RowNetwork
from layerpack.runtime.trace.steps import Pass, Steps
from layerpack.runtime.trace.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What came out. `finish` is stop (an end token), length, or interrupted.

    `passes` counts runs of the model, prefill included; `pass_s` their mean, in seconds, a
    draft's time included; `first_pass_s` the first alone. `decode_passes` are those that gave
    tokens: all but the first ones of a long prompt. Of `proposed_tokens`, by a draft or prompt
    lookup, `accepted_tokens` were right. `seed` is what was sampled with; None for greedy decoding.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish: str
    seed: int | None
    passes: int
    decode_passes: int
    proposed_tokens: int
    seconds: float
    first_pass_s: float
    peak_vram_bytes: int

    @property
    def pass_s(self) -> float:
        """Mean seconds of a pass."""
        return self.seconds / self.passes if self.passes else 0.0

    @property
    def accepted_tokens(self) -> int:
        """Proposed tokens that were right: each pass gives one token of its own beside them."""
        return max(0, len(self.token_ids) - self.decode_passes)

    @property
    def tokens_per_pass(self) -> float:
        """Mean number of tokens that a pass gave."""
        return len(self.token_ids) / self.decode_passes if self.decode_passes else 0.0


@device_errors("in a pass")
def run_generation(
    network: Any,
    rows: RowNetwork | None,
    tokenizer: Any,
    prompt: str | Sequence[Message],
    options: GenerateOptions,
    *,
    patience: Patience,
    trace: Trace,
    context_limit: int | None = None,
    reserved_tokens: int | None = None,
    draft: Draft | None = None,
    rows_are_free: bool = False,
    free_rows: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """See `Model.generate`; `rows` is the network for tables of rows, None if it takes none.

    `rows_are_free`: the device waits for weights longer than some more tokens take; `free_rows`: so
    many, where that was measured.

    `context_limit` is the model's, `reserved_tokens` the most that memory was set aside for; None
    where there is no bound.
    """
    ids = encode_prompt(tokenizer, prompt, options, embedding_rows=_embedding_rows(network))
    prompt_tokens = len(ids)
    most = prompt_tokens + tokens_left(
        prompt_tokens, options.max_new_tokens, limit=context_limit, reserved=reserved_tokens
    )
    on_gpu = network.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(network.device)
    begin_s = time.perf_counter()  # before the first step begins: together they take no longer
    steps, sampler, sink = Steps(trace), Sampler(options), TextSink(tokenizer, on_text)
    ends, finish = _end_ids(network), "length"
    with ExitStack() as stack:
        stack.enter_context(_memory_named())
        sequence, proposer = _begin(
            stack,
            network,
            rows,
            draft,
            options,
            sampler,
            most,
            lookup=options.lookup_tokens(rows_are_free=rows_are_free),
            free_rows=free_rows,
            patience=patience,
            steps=steps,
        )
        try:
            while finish == "length" and len(ids) < most:
                tree = Tree()
                if proposer is not None and len(ids) > prompt_tokens:
                    room = sequence.room(len(ids))
                    left = most - len(ids) - 1
                    tree = proposer.propose(ids, left if room is None else min(left, room))
                    steps.proposed()
                logits = sequence.extend(ids, tree)
                new, right = follow(tree, sampler.chooser(logits, len(ids)))
                sequence.keep(right)
                if proposer is not None:
                    proposer.accepted(right)
                new = _cut(new, ends)
                steps.known(len(new))
                ids += new
                sink.put(new)
                if new[-1] in ends:
                    finish = "stop"
        except CancelledError:
            finish = "interrupted"
    seconds = time.perf_counter() - begin_s
    trace.clock.finish()
    decode_passes, num_proposed = count_proposed(steps.passes, prompt_tokens)
    return Generation(
        text=sink.text,
        token_ids=tuple(sink.token_ids),
        prompt_tokens=prompt_tokens,
        finish=finish,
        seed=sampler.seed,
        passes=len(steps.passes),
        decode_passes=decode_passes,
        proposed_tokens=num_proposed,
        seconds=seconds,
        first_pass_s=steps.passes[0].seconds if steps.passes else 0.0,
        peak_vram_bytes=torch.cuda.max_memory_allocated(network.device) if on_gpu else 0,
    )


def count_proposed(passes: Sequence[Pass], prompt_tokens: int) -> tuple[int, int]:
    """(passes that gave tokens, tokens proposed in all).

    The first passes of a long prompt give none. Of the tokens that went in, the prompt and the
    last token of each pass before were known; the rest was proposed.
    """
    seen = decode_passes = 0
    for one in passes:
        seen += one.num_tokens
        decode_passes += seen >= prompt_tokens
    return decode_passes, max(0, seen - prompt_tokens - max(0, decode_passes - 1))


def _begin(
    stack: ExitStack,
    network: Any,
    rows: RowNetwork | None,
    draft: Draft | None,
    options: GenerateOptions,
    sampler: Sampler,
    most: int,
    *,
    lookup: int,
    free_rows: int,
    patience: Patience,
    steps: Steps,
) -> tuple[AnySequence, Proposer | None]:
    """The sequence, and who proposes tokens to it."""
    if rows is None:
        plain = PlainSequence.opened(network, max_tokens=most, patience=patience, steps=steps)
        return stack.enter_context(plain), None
    proposer: Proposer | None = None
    nodes, pace = options.draft_tokens, None
    if nodes is None:
        nodes, pace = max(1, free_rows - 1 - lookup), Pace()
    if draft is None:
        nodes = 0
    if draft is not None and nodes:
        shape = shape_of(nodes)
        drafted = RowSequence.opened(
            draft.rows, max_tokens=most, max_nodes=shape.levels * shape.beams, patience=patience
        )
        proposer = DraftProposer(stack.enter_context(drafted), sampler, shape, pace)
    if lookup:
        proposer = LookupProposer(lookup, proposer)
    opened = RowSequence.opened(
        rows,
        max_tokens=most,
        max_nodes=nodes + lookup,
        patience=patience,
        steps=steps,
    )
    return stack.enter_context(opened), proposer


@contextmanager
def _memory_named() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StreamError(
            f"the device ran out of memory in a pass ({first_line(error)}); "
            "lower --context, or keep fewer layers resident with a lower --vram"
        ) from error


def _cut(new: list[int], ends: set[int]) -> list[int]:
    """Up to the first end token."""
    for place, token in enumerate(new):
        if token in ends:
            return new[: place + 1]
    return new


def _end_ids(network: Any) -> set[int]:
    ends = network.generation_config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, (list, tuple)) else {int(ends)}


def _embedding_rows(network: Any) -> int:
    return int(network.get_input_embeddings().num_embeddings)
