"""Many requests on the same passes: who is let in, what each pass carries, who has ended.

Requests come from any thread. One thread, a model's own, runs the passes: each takes the next token
of every sequence that is decoding, with a tree of proposed ones where rows are free, and as much of
waiting prompts as a pass holds. A sequence's text does not depend on who else is there.
Source of the idea: Yu et al., Orca, https://www.usenix.org/conference/osdi22/presentation/yu.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from layerpack.formats.errors import LayerpackError
from layerpack.runtime.core.device_errors import device_failed, is_device_error, out_of_memory
from layerpack.runtime.core.patience import CancelledError, Patience
from layerpack.runtime.engine.pool import Pool, common
from layerpack.runtime.engine.proposers import Proposer
from layerpack.runtime.engine.sampling import Sampler
from layerpack.runtime.engine.sequence import PlainSequence, RowSequence
from layerpack.runtime.engine.step import step
from layerpack.runtime.network.rows import Part
from layerpack.runtime.opening import Opened
from layerpack.runtime.plan.needs import PREFILL_TOKENS
from layerpack.runtime.requests.answer import AllGivenUp, Answer
from layerpack.runtime.requests.bounds import Bounds, Counts
from layerpack.runtime.requests.proposing import Proposing
from layerpack.runtime.requests.queue import Queue, Waiting
from layerpack.runtime.requests.running import Running
from layerpack.runtime.trace.steps import Steps
from layerpack.runtime.trace.trace import Trace

_WORTH_WAITING_TOKENS = 32


class Scheduler:
    """`put` requests from any thread; `run` them in the network's own until none is left."""

    def __init__(self, model: Opened, *, bounds: Bounds, patience: Patience, trace: Trace) -> None:
        self._model, self._patience, self._trace = model, patience, trace
        self._queue = Queue(model, bounds)
        self._running: list[Running] = []
        self._pool: Pool | None = None
        self._proposing: Proposing | None = None
        self._alone = True
        self._closing = threading.Event()
        if model.rows is not None:
            self._alone = model.rows.follows_length
            share = model.rows.has_equal_bits and not self._alone
            self._pool = Pool(model.rows, share=share, patience=patience)
            self._proposing = Proposing(
                model.draft,
                patience=patience,
                free_rows=bounds.free_rows,
                rows_are_free=bounds.rows_are_free,
            )
        self.counts = Counts()

    @property
    def num_waiting(self) -> int:
        """Requests in the queue now. Any thread."""
        return self._queue.num_waiting

    def put(self, answer: Answer) -> None:
        """A request; `run` comes to it. Any thread."""
        self._queue.put(answer)

    def run(self) -> None:
        """Passes until nothing is left. Raises nothing that a request caused."""
        try:
            while not self._closing.is_set():
                self._queue.look()
                for running in [one for one in self._running if one.answer.is_cancelled]:
                    self._end(running)
                self._let_in()
                if not self._running:
                    return
                self._pass()
        except Exception as error:  # whoever waits for an answer must hear of anything
            self._queue.refuse(error)
            self._fail(list(self._running), error)
        finally:
            self._patience.watch(self._closing)
            self._trace.clock.finish()

    def close(self) -> None:
        """Let the pass at hand be the last one, and end early. Any thread."""
        self._closing.set()

    def refuse(self, error: Exception) -> None:
        """What is here ends: what waits in `error`. For the thread of the passes, after `close`."""
        self._queue.refuse(error)
        for running in list(self._running):
            self._end(running)
        # The network's memory is to go.
        self._pool = self._proposing = None

    def _let_in(self) -> None:
        queue = self._queue
        if self._pool is not None and not self._running and len(queue):
            self._pool.reserve(queue.wanted_slots())
        while len(queue) and not (self._alone and self._running):
            first = queue.first
            try:
                if self._is_worth_waiting(first) or not self._begin(first):
                    break
            except Exception as error:  # of this one alone
                first.answer.end(error)
            queue.take_first()
        self.counts.running = len(self._running)

    def _is_worth_waiting(self, waiting: Waiting) -> bool:
        """Whether somebody is about to compute much of its beginning."""
        if self._pool is None or not self._pool.shares:
            return False
        enough = self._pool.num_shared(waiting.ids) + _WORTH_WAITING_TOKENS
        return any(
            not running.is_decoding
            and common(waiting.ids, running.ids, len(running.ids) - 1) >= enough
            for running in self._running
        )

    def _begin(self, waiting: Waiting) -> bool:
        """Let it in, if it fits; what it has then goes with it, or with an error here."""
        if not self._running and self._model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._model.device)
        with ExitStack() as taken:
            running = self._let_in_to(taken, waiting)
            if running is None:
                return False
            running.on_end = taken.pop_all().close
        self._running.append(running)
        return True

    def _let_in_to(self, stack: ExitStack, waiting: Waiting) -> Running | None:
        if self._pool is None:
            opened = PlainSequence.opened(
                self._model.network, max_tokens=waiting.most, patience=self._patience
            )
            plain = stack.enter_context(opened)
            return self._running_of(waiting, plain, None, Sampler(waiting.answer.options))
        if not self._running:
            self._pool.reserve(waiting.most + waiting.nodes)
        sequence = self._pool.open(waiting.ids, waiting.most)
        if sequence is None:
            return None
        stack.callback(self._pool.close, sequence)
        if self._alone:
            stack.enter_context(sequence.alone())
        assert self._proposing is not None
        sampler = Sampler(waiting.answer.options)
        proposer = self._proposing.begin(
            stack, waiting.answer.options, sampler, most=waiting.most, nodes=waiting.nodes
        )
        self.counts.cached_tokens += sequence.num_known
        return self._running_of(waiting, sequence, proposer, sampler)

    def _running_of(
        self,
        waiting: Waiting,
        sequence: RowSequence | PlainSequence,
        proposer: Proposer | None,
        sampler: Sampler,
    ) -> Running:
        waiting.answer.place, waiting.answer.has_begun = 0, True
        self.counts.prompt_tokens += len(waiting.ids)
        return Running(
            waiting.answer,
            ids=waiting.ids,
            most=waiting.most,
            ends=_end_ids(self._model.network),
            sampler=sampler,
            tokenizer=self._model.need_tokenizer(),
            sequence=sequence,
            proposer=proposer,
        )

    def _pass(self) -> None:
        here = list(self._running)
        self._patience.watch(AllGivenUp([running.answer for running in here], self._closing))
        begin_s, steps = time.perf_counter(), Steps(self._trace)
        try:
            if self._pool is None:
                self._plain_pass(here[0], steps)
            else:
                self._rows_pass(here, steps)
        except CancelledError:
            for running in here:  # all had given up, or the model is being closed
                self._end(running)
        except torch.OutOfMemoryError as error:
            self._fail(here, out_of_memory(error))
        except LayerpackError as error:
            self._fail(here, error)
        except Exception as error:  # whoever waits for an answer must hear of anything
            self._fail(here, device_failed("in a pass", error) if is_device_error(error) else error)
        self.counts.passes += 1
        self.counts.pass_s += time.perf_counter() - begin_s

    def _plain_pass(self, running: Running, steps: Steps) -> None:
        assert isinstance(running.sequence, PlainSequence)
        running.skip_proposals()
        begin_s = time.perf_counter()
        while True:
            missing = min(running.num_missing, PREFILL_TOKENS)
            logits, is_last = running.sequence.advance(running.ids)
            best = logits.argmax(-1).tolist() if is_last else []
            running.ran(begin_s, missing)
            if is_last:
                break
            steps.known(0)
            begin_s = time.perf_counter()
        self._taken([running], self._take(running, logits, best), steps)

    def _rows_pass(self, here: list[Running], steps: Steps) -> None:
        assert self._pool is not None and self._proposing is not None
        assert self._model.rows is not None
        begin_s = time.perf_counter()
        decoding = [running for running in here if running.is_decoding]
        filling = [running for running in here if not running.is_decoding]
        budget = PREFILL_TOKENS
        if self._proposing.propose(decoding, self._pool.num_spare):
            steps.proposed()
        carried: list[tuple[Running, Part, bool]] = []
        for running in (*decoding, *filling):
            if budget <= 0:
                break
            assert isinstance(running.sequence, RowSequence)
            if not running.is_decoding:
                running.skip_proposals()
            part, is_last = running.sequence.part(running.ids, running.tree, budget)
            budget -= part.num_rows
            carried.append((running, part, is_last))
        with ExitStack() as around:
            if self._alone:
                assert isinstance(carried[0][0].sequence, RowSequence)
                around.enter_context(carried[0][0].sequence.turned())
            logits = step(self._model.rows, [part for _, part, _ in carried])
        # One wait for the device: whoever wants more of it than the likeliest tokens waits again.
        best = logits.argmax(-1).tolist()
        place = given = 0
        for running, part, is_last in carried:
            end = place + part.num_asked
            assert isinstance(running.sequence, RowSequence)
            running.sequence.written()
            running.ran(begin_s, part.num_rows)
            self.counts.rows += part.num_rows
            if is_last:
                given += self._take(running, logits[place:end], best[place:end])
            place = end
        self.counts.free_rows += max(0, budget)
        self._taken([running for running, _, _ in carried], given, steps)

    def _taken(self, here: Sequence[Running], given: int, steps: Steps) -> None:
        steps.known(given)
        for running in here:
            if running.is_over and running in self._running:
                self._end(running)

    def _take(self, running: Running, logits: torch.Tensor, best: list[int]) -> int:
        proposed = len(running.tree)
        try:
            given = running.take(logits, best)
        except (CancelledError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of this one alone
            if is_device_error(error):
                raise
            self._fail([running], error)
            return 0
        self.counts.generated_tokens += given
        self.counts.proposed_tokens += proposed
        self.counts.accepted_tokens += min(proposed, given - 1)
        return given

    def _end(self, running: Running) -> None:
        self._running.remove(running)
        on_gpu = self._model.device.type == "cuda"
        running.end(torch.cuda.max_memory_allocated(self._model.device) if on_gpu else 0)

    def _fail(self, here: list[Running], error: Exception) -> None:
        for running in here:
            if running in self._running:
                self._running.remove(running)
                running.fail(copy.copy(error))  # each is raised in a place of its own
        if self._pool is not None:
            self._pool.clear()  # what a broken pass wrote is nobody's


def _end_ids(network: Any) -> set[int]:
    ends = network.generation_config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, (list, tuple)) else {int(ends)}
