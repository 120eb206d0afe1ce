"""An open model: the door for whoever uses layerpack from Python."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from layerpack.formats.errors import PromptError, StreamError
from layerpack.formats.pack import Pack
from layerpack.runtime.core.device_errors import device_errors, out_of_memory
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.progress import PassProgress
from layerpack.runtime.core.threads import Worker
from layerpack.runtime.engine.draft import Draft
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.step import whole_step
from layerpack.runtime.generate import Generation
from layerpack.runtime.machine.machine import Machine
from layerpack.runtime.network.row_network import RowNetwork
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.opening import Opened, SetupTimes, opened
from layerpack.runtime.plan.needs import context_limit
from layerpack.runtime.plan.plan import Plan
from layerpack.runtime.requests.answer import Answer, Piece, Prompt
from layerpack.runtime.requests.bounds import Bounds, Counts
from layerpack.runtime.requests.scheduler import Scheduler
from layerpack.runtime.trace.trace import NO_TRACE, Trace

OnText = Callable[[str], None]


class Model:
    """A pack that can generate. Make one with `Model.open`, in a with statement.

    One thread of the model's own opens it, runs every pass and closes it; any number of threads may
    call, and share the passes. `network` is transformers' model (its forward, config and generate
    all work, in one thread at a time, while nothing is being generated); `plan` says where the
    weights are; `draft` is what was asked for when opening; `reserved_tokens` is the longest
    sequence that memory was set aside for, None where there is no bound.
    """

    def __init__(
        self, model: Opened, worker: Worker, patience: Patience, trace: Trace, options: OpenOptions
    ) -> None:
        self._model, self._worker = model, worker
        self._patience, self._trace = patience, trace
        on_gpu = model.device.type == "cuda"
        self.reserved_tokens = options.planned_tokens if on_gpu else options.context_tokens
        self._scheduler = Scheduler(
            model,
            bounds=Bounds(
                context=context_limit(model.pack),
                reserved=self.reserved_tokens,
                kv_tokens=options.planned_kv_tokens,
                rows_are_free=on_gpu and model.plan.streamed_bytes > 0,
                free_rows=model.free_rows,
            ),
            patience=patience,
            trace=trace,
        )
        self._closing = False

    @classmethod
    @contextmanager
    def open(
        cls,
        path: Path | str | Pack,
        options: OpenOptions = OpenOptions(),
        *,
        trace: Trace = NO_TRACE,
    ) -> Iterator[Model]:
        """Open the pack at `path`; closing joins all threads and undoes all registrations.

        A Pack that is open already is not read again. `trace` collects when each stage did what
        (see profile.py). Raises PackError, CapacityError (what was asked for does not fit),
        StreamError, and SourceError for a draft that cannot be used.
        """
        pack = path if isinstance(path, Pack) else Pack.open(path)
        patience = Patience(options.watchdog_s)
        worker = Worker("model", patience)
        stack = contextlib.ExitStack()
        model = None
        try:
            opening = opened(pack, options, trace=trace, patience=patience)
            found = worker.call(lambda: stack.enter_context(opening))
            model = cls(found, worker, patience, trace, options)
            yield model
        finally:
            if model is not None:
                model._closing = True
                model._scheduler.close()
            patience.cancel()  # what is being generated ends
            try:
                if model is not None:
                    worker.call(functools.partial(model._scheduler.refuse, _closed()))
                worker.call(stack.close)
            finally:
                worker.close()

    @property
    def pack(self) -> Pack:
        """What was opened."""
        return self._model.pack

    @property
    def plan(self) -> Plan:
        """Where each slice lives."""
        return self._model.plan

    @property
    def machine(self) -> Machine:
        """What the plan was made for."""
        return self._model.machine

    @property
    def setup(self) -> SetupTimes:
        """Where the time of opening went."""
        return self._model.setup

    @property
    def network(self) -> Any:
        """transformers' model; None once the model is closed."""
        return self._model.network

    @property
    def rows(self) -> RowNetwork | None:
        """The same network for passes of rows (`engine.step`); None if it takes none."""
        return self._model.rows

    @property
    def why_no_rows(self) -> str | None:
        """Why it cannot check several proposed tokens in a pass; None if it can."""
        return self._model.why_no_rows

    @property
    def draft(self) -> Draft | None:
        """The draft that it was opened with."""
        return self._model.draft

    @property
    def free_rows(self) -> int:
        """How many tokens of a pass cost nothing; 0 if that was not measured."""
        return self._model.free_rows

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the pack. Raises PackError if there is none."""
        return self._model.need_tokenizer()

    def submit(self, prompt: Prompt, options: GenerateOptions = GenerateOptions()) -> Answer:
        """Ask for an answer to a text, or to chat messages; it comes while others do.

        All that are under way share the passes; the text is that of `generate`. Waits not: iterate
        over the answer (`for`, `async for`), or `wait` for it. Raises StreamError if the model is
        closed; what is wrong with the prompt, the answer raises.
        """
        self._require_open()
        answer = Answer(prompt, options)
        self._scheduler.put(answer)
        self._worker.submit(self._scheduler.run)
        return answer

    def generate(
        self,
        prompt: Prompt,
        options: GenerateOptions = GenerateOptions(),
        *,
        on_text: OnText | None = None,
        on_wait: Callable[[PassProgress], None] = lambda progress: None,
    ) -> Generation:
        """Generate from a prompt (a text, or chat messages); waits.

        `on_text(piece)` is called, in this thread, with each piece of text as soon as it is
        certain, `on_wait(progress)` a few times a second while none comes. Ctrl-C ends the
        generation early: what there is comes back, with `finish` "interrupted". Raises PromptError,
        StreamError.
        """
        answer = self.submit(prompt, options)
        say: OnText = on_text or (lambda piece: None)
        wait = functools.partial(on_wait, self._model.progress)
        try:
            _say(answer.pieces(wait), say)
        except KeyboardInterrupt:
            answer.cancel()
            _say(answer.pieces(), say)
        except BaseException:
            answer.cancel()
            raise
        return answer.wait()

    def stream(self, prompt: Prompt, options: GenerateOptions = GenerateOptions()) -> Iterator[str]:
        """The text piece by piece, each as soon as it is certain; raises what `generate` does.

        Passes go on while nobody reads. A loop left early ends the generation, as does closing the
        model.
        """
        self._require_open()
        return self._stream(prompt, options)

    def _stream(self, prompt: Prompt, options: GenerateOptions) -> Iterator[str]:
        answer = self.submit(prompt, options)
        try:
            for piece in answer.pieces():
                if piece:
                    yield piece
        except BaseException:  # the loop was left, or Ctrl-C came
            answer.cancel()
            answer.ended(self._patience.watchdog_s)
            raise
        answer.wait()

    def logits(self, ids: torch.Tensor, last: int) -> torch.Tensor:
        """One pass of transformers' own forward over whole sequences, for who judges a model.

        `ids`: int64 (sequences, tokens). Returns the logits (sequences, last, vocabulary) of the
        last tokens of each, in the model's dtype, on its device. Ctrl-C ends the pass. Raises
        StreamError, and PromptError for a token that the model has not.
        """
        self._require_open()
        rows = self._model.network.get_input_embeddings().num_embeddings
        if not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise PromptError(
                f"tokens {int(ids.min())} to {int(ids.max())}: the model's embedding ends at "
                f"{rows - 1}; use the tokenizer that it was trained with"
            )

        @device_errors("in a pass")
        def run() -> torch.Tensor:
            try:
                return whole_step(self._model.network, ids, last)
            except torch.OutOfMemoryError as error:
                raise out_of_memory(error) from error

        return self._worker.call(run)

    @property
    def counts(self) -> Counts:
        """What the passes have carried so far."""
        return self._scheduler.counts

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self._scheduler.num_waiting

    @property
    def kv_slots(self) -> tuple[int, int]:
        """(tokens that the KV cache has room for now, of these free); it grows with requests."""
        rows = self._model.rows
        return (0, 0) if rows is None else (rows.kv.num_slots, rows.kv.num_free)

    @property
    def progress(self) -> PassProgress:
        """How far the pass at hand has come."""
        return self._model.progress

    def _require_open(self) -> None:
        if self._closing:
            raise _closed()


def _closed() -> StreamError:
    return StreamError("the model is closed; open it again")


def _say(pieces: Iterator[Piece], say: OnText) -> None:
    for piece in pieces:
        if piece:
            say(piece)
