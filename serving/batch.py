"""A file of requests to a file of results, in OpenAI's batch format; goes on after any break.

Each line of the requests is {"custom_id", "method", "url", "body"}, each of the results
{"id", "custom_id", "response", "error"}. A result is appended, and on the disk, when its answer is
whole; what is there already is not asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerpack.formats.disk import is_full
from layerpack.formats.errors import (
    DiskFullError,
    LayerpackError,
    PromptError,
    SourceError,
    TargetError,
)
from layerpack.formats.jsontext import parse_json
from layerpack.formats.text import without_mark
from layerpack.runtime.generate import Generation
from layerpack.runtime.model import Model
from layerpack.runtime.requests.answer import Answer
from layerpack.serving.asking import CHAT, Asked, asked_of
from layerpack.serving.fields import Fields, RequestError, shown
from layerpack.serving.telling import Teller, refused

DEFAULT_TOKENS = 512
_AHEAD = 256  # requests that are with the model at a time: enough for any number of sequences


@dataclass(slots=True, kw_only=True)
class Line:
    """A line of the requests: its number, from 1, and what it says, or what is wrong with it."""

    number: int
    custom_id: str | None = None
    url: str = CHAT
    body: Any = None
    problem: RequestError | None = None


@dataclass(slots=True, kw_only=True)
class Tally:
    """How far a batch is."""

    total: int
    before: int
    answered: int = 0
    failed: int = 0
    tokens: int = 0


def read_requests(path: Path) -> list[Line]:
    """The lines of a file of requests, those that are wrong marked. Raises SourceError."""
    found, seen = list[Line](), dict[str, int]()
    for number, raw in _lines(path):
        line = Line(number=number)
        try:
            _read(line, raw)
            assert line.custom_id is not None
            if line.custom_id in seen:
                first = seen[line.custom_id]
                raise RequestError(
                    f"custom_id {shown(line.custom_id)} is that of line {first}, too",
                    param="custom_id",
                )
            seen[line.custom_id] = number
        except RequestError as problem:
            line.problem = problem
        found.append(line)
    if not found:
        raise SourceError(f"{path}: there are no requests in it")
    return found


def read_prompts(path: Path, body: dict[str, Any]) -> list[Line]:
    """Each line of a text as a chat's message, with `body` for the rest. Raises SourceError."""
    found = []
    for number, raw in _lines(path):
        line = Line(number=number, custom_id=f"line-{number}")
        try:
            message = {"role": "user", "content": raw.decode()}
            line.body = {**body, "messages": [message]}
        except UnicodeDecodeError:
            line.problem = RequestError("the line is not UTF-8")
        found.append(line)
    if not found:
        raise SourceError(f"{path}: there are no prompts in it")
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        whole = without_mark(path.read_bytes(), str(path))
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}; give a file of requests") from error
    except PromptError as error:
        raise SourceError(str(error)) from error
    for number, raw in enumerate(whole.split(b"\n"), start=1):
        if text := raw.strip():
            yield number, text


def _read(line: Line, raw: bytes) -> None:
    try:
        said = parse_json(raw)
    except ValueError as reason:
        raise RequestError(f"not JSON ({reason})") from reason
    fields = Fields(said)
    custom_id = fields.take("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError("custom_id: a text was expected", param="custom_id")
    line.custom_id = custom_id
    method, url = fields.take("method"), fields.take("url")
    line.body = fields.take("body")
    fields.end()
    if method not in (None, "POST"):
        raise RequestError(f"method: {shown(method)} is not POST", param="method")
    if not isinstance(url, str):
        raise RequestError("url: a text was expected", param="url")
    line.url = url


class Results:
    """The file of results: what it has, and more appended."""

    def __init__(self, path: Path) -> None:
        """Reads what is there; a torn last line is cut off. Raises TargetError."""
        self._path = path
        self.done: set[tuple[str | None, int | None]] = set()
        try:
            self._file = open(path, "ab+")  # noqa: SIM115 - open until `close`
            self._file.seek(0)
            end = 0
            for raw in self._file:
                if not raw.endswith(b"\n"):
                    break
                self._note(raw)
                end += len(raw)
            self._file.truncate(end)
        except OSError as error:
            raise TargetError(f"{path}: {error.strerror}; give a file to write to") from error

    def _note(self, raw: bytes) -> None:
        try:
            said = parse_json(raw)
            custom_id, response = said["custom_id"], said["response"]
            line = said.get("line")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TargetError(
                f"{self._path}: not a file of results; give one that is, or one that is not there"
            ) from error
        if response is not None:
            self.done.add((custom_id, line))

    def add(self, line: Line, *, status: int, body: dict[str, Any]) -> None:
        """One result; on the disk when this returns. Raises DiskFullError, TargetError."""
        request = secrets.token_hex(12)
        said = {
            "id": f"batch_req_{request}",
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": f"req_{request}", "body": body},
            "error": None if status < 400 else body["error"],
        }
        if line.custom_id is None or line.problem is not None:
            said["line"] = line.number
        try:
            self._file.write(json.dumps(said, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            if is_full(error):
                raise DiskFullError(
                    f"{self._path}: the disk is full; free some of it, and run the same command "
                    "again to go on"
                ) from error
            raise TargetError(f"{self._path}: {error.strerror}") from error

    def has(self, line: Line) -> bool:
        """Whether a line has its result."""
        key = (line.custom_id, line.number if line.problem is not None else None)
        return key in self.done

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()


def run_batch(
    model: Model,
    lines: list[Line],
    results: Results,
    *,
    name: str,
    default_tokens: int = DEFAULT_TOKENS,
    on_progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Answer every line that has no result yet; waits.

    Where a request samples and states no seed, it has one of its own, by its custom_id: the same
    in every run. Raises TargetError, StreamError (a device that failed); Ctrl-C ends it at once.
    """
    left = deque(line for line in lines if not results.has(line))
    tally = Tally(total=len(lines), before=len(lines) - len(left))
    under_way: dict[int, tuple[Line, Teller, list[Answer]]] = {}
    try:
        while left or under_way:
            while left and len(under_way) < _AHEAD:
                line = left.popleft()
                try:
                    under_way[line.number] = _ask(model, line, name, default_tokens)
                except RequestError as error:
                    results.add(line, status=error.status, body=error.body)
                    tally.failed += 1
            on_progress(tally)
            ended = [number for number, (_, _, answers) in under_way.items() if _over(answers)]
            if not ended and under_way:
                next(iter(under_way.values()))[2][0].ended(0.2)
            for number in ended:
                line, teller, answers = under_way.pop(number)
                _end(results, tally, line, teller, answers)
        on_progress(tally)
        return tally
    finally:
        for _, _, answers in under_way.values():
            for answer in answers:
                answer.cancel()


def _over(answers: list[Answer]) -> bool:
    return all(answer.is_over for answer in answers)


def _ask(
    model: Model, line: Line, name: str, default_tokens: int
) -> tuple[Line, Teller, list[Answer]]:
    if line.problem is not None:
        raise line.problem
    seed = int.from_bytes(
        hashlib.blake2b(str(line.custom_id).encode(), digest_size=4).digest(), "big"
    )
    asked: Asked = asked_of(line.url, line.body, default_tokens=default_tokens, seed=seed)
    if asked.stream:
        raise RequestError("stream: a batch gives whole answers", param="stream")
    teller = Teller(asked, model=name, tokenizer=model.tokenizer)
    return line, teller, [model.submit(*each) for each in asked.prompts]


def _end(results: Results, tally: Tally, line: Line, teller: Teller, answers: list[Answer]) -> None:
    done: list[Generation] = []
    try:
        done = [answer.wait() for answer in answers]
    except LayerpackError as reason:
        error = refused(reason)
        if error.status >= 500:  # the machine's fault, not the request's: to be asked again
            raise
        results.add(line, status=error.status, body=error.body)
        tally.failed += 1
        return
    results.add(line, status=200, body=teller.whole(done))
    tally.answered += 1
    tally.tokens += sum(len(one.token_ids) for one in done)
