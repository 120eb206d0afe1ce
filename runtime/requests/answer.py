"""An answer under way: its text piece by piece, for threads and for coroutines, and its result."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from queue import Empty, SimpleQueue

from layerpack.runtime.core.patience import TICK_S
from layerpack.runtime.core.threads import Job
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.prompt import Message
from layerpack.runtime.engine.sampling import Token
from layerpack.runtime.generate import Generation

Prompt = str | Sequence[Message]


class Piece(str):
    """Text that is certain now, and the `tokens` that made it so; it may be empty."""

    tokens: tuple[Token, ...]

    def __new__(cls, text: str, tokens: Sequence[Token] = ()) -> Piece:
        """The text with its tokens."""
        piece = super().__new__(cls, text)
        piece.tokens = tuple(tokens)
        return piece

    @property
    def has_logprobs(self) -> bool:
        """Whether its tokens' log-probabilities were asked for."""
        return any(token.logprob is not None for token in self.tokens)


class Answer:
    """What was asked, and what comes: iterate over it in one thread or coroutine, or `wait`.

    Leaving it alone leaves it going on; `cancel` ends it within a pass.
    """

    def __init__(self, prompt: Prompt, options: GenerateOptions) -> None:
        self.prompt, self.options = prompt, options
        self.place = 0
        """Its place in the queue, from 1; 0 from the pass on that it is in."""
        self.has_begun = False
        """Whether it was let in: its prompt is in order."""
        self._pieces: SimpleQueue[Piece | None] = SimpleQueue()
        self._woken: list[Callable[[], object]] = []
        self._outcome: Generation | Exception | None = None
        self._job = Job(self._result, self._ended)

    def cancel(self) -> None:
        """Let it end; the text so far stays its result, with `finish` "interrupted"."""
        self._job.cancel()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        return self._job.cancelled.is_set()

    @property
    def is_over(self) -> bool:
        """Whether all of it is there."""
        return self._job.over

    def wait(self) -> Generation:
        """All of it; waits. Raises PromptError, StreamError."""
        return self._job.wait()

    def ended(self, within_s: float) -> bool:
        """Whether it is over; waits for it so long."""
        return self._job.ended(within_s)

    def pieces(self, on_wait: Callable[[], object] = lambda: None) -> Iterator[Piece]:
        """Each as soon as it is certain, to the end; `on_wait()` now and then meanwhile."""
        while True:
            try:
                # In short waits: on Windows Ctrl-C comes through only between two of them.
                piece = self._pieces.get(timeout=TICK_S)
            except Empty:
                if self.is_over:  # Ctrl-C came as the last one was taken
                    return
                on_wait()
                continue
            if piece is None:
                return
            yield piece

    def __iter__(self) -> Iterator[Piece]:
        """The same; raises what `wait` does. A loop left early ends the answer."""
        try:
            yield from self.pieces()
        except BaseException:  # the loop was left, or Ctrl-C came
            self.cancel()
            raise
        self.wait()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The same for a coroutine."""
        loop, wake = asyncio.get_running_loop(), asyncio.Event()

        def woken() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(wake.set)

        self._woken.append(woken)
        try:
            while True:
                wake.clear()
                try:
                    piece = self._pieces.get_nowait()
                except Empty:
                    if self.is_over:
                        break
                    await wake.wait()
                    continue
                if piece is None:
                    break
                yield piece
        except BaseException:
            self.cancel()
            raise
        finally:
            self._woken.remove(woken)
        while not self.is_over:  # it is about to be
            await asyncio.sleep(0.001)
        self.wait()

    def put(self, piece: Piece) -> None:
        """For the thread that makes it: more text."""
        self._pieces.put(piece)
        self._wake()

    def end(self, outcome: Generation | Exception) -> None:
        """For the thread that makes it: this is all, or why there is no more."""
        self._outcome = outcome
        self._job.run()
        self._wake()

    def _result(self) -> Generation:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def _ended(self) -> None:
        self._pieces.put(None)

    def _wake(self) -> None:
        for woken in list(self._woken):
            woken()


class AllGivenUp:
    """Set when nobody wants the pass at hand: all whose it is have cancelled, or the model closes.

    As an Event, for `Patience`.
    """

    def __init__(self, answers: Sequence[Answer], closing: threading.Event) -> None:
        self._answers, self._closing = answers, closing

    def is_set(self) -> bool:
        """Whether it is so."""
        return self._closing.is_set() or all(answer.is_cancelled for answer in self._answers)

    def set(self) -> None:
        """The model closes."""
        self._closing.set()
