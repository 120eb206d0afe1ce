"""An answer as server-sent events, with comment lines that say that it is alive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from layerpack.runtime.model import Model
from layerpack.runtime.requests.answer import Answer, Piece
from layerpack.serving.telling import Parts, Teller, refused


async def events(
    model: Model, teller: Teller, answers: list[Answer], *, ping_s: float
) -> AsyncIterator[str]:
    """Server-sent events. Comment lines (: …) say that it is alive: one line end each."""
    news: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def follow(index: int, answer: Answer) -> None:
        try:
            async for piece in answer:
                news.put_nowait((index, piece))
            news.put_nowait((index, None))
        except Exception as error:  # told to the client
            news.put_nowait((index, error))

    tasks = [asyncio.create_task(follow(*each)) for each in enumerate(answers)]
    parts = [Parts(has_tools=teller.asked.has_tools) for _ in answers]
    begun, called, open_choices = set[int](), set[int](), len(answers)
    try:
        yield _ping(model, answers)
        while open_choices:
            try:
                index, piece = await asyncio.wait_for(news.get(), ping_s)
            except (asyncio.TimeoutError, TimeoutError):
                yield _ping(model, answers)
                continue
            if isinstance(piece, Exception):
                yield _event(refused(piece).body)
                return
            if index not in begun:
                begun.add(index)
                if (first := teller.first(index)) is not None:
                    yield _event(first)
            is_last = piece is None
            said = parts[index].put(piece or "", is_last=is_last)
            if said.calls:
                called.add(index)
            tokens = piece.tokens if piece is not None and piece.has_logprobs else ()
            if (new := teller.piece(index, said, tokens)) is not None:
                yield _event(new)
            if is_last:
                open_choices -= 1
                done = answers[index].wait()
                yield _event(teller.last(index, done, called=index in called))
        if teller.asked.include_usage:
            yield _event(teller.usage_piece([answer.wait() for answer in answers]))
        yield "data: [DONE]\n\n"
    finally:
        cancel(answers)
        for task in tasks:
            task.cancel()


def _ping(model: Model, answers: list[Answer]) -> str:
    place = max(answer.place for answer in answers)
    if place:
        return f": ping, number {place} in the queue\n"
    progress = model.progress
    return f": ping, layer {progress.done + 1} of {progress.total}\n"


def cancel(answers: list[Answer]) -> None:
    """Nobody wants them any more."""
    for answer in answers:
        answer.cancel()


def _event(said: dict[str, Any]) -> str:
    return f"data: {json.dumps(said, ensure_ascii=False)}\n\n"
