"""From what a model said to the JSON of OpenAI's answers, as a whole and in pieces."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from layerpack.formats.errors import LayerpackError, PromptError
from layerpack.runtime.engine.sampling import Token
from layerpack.runtime.generate import Generation
from layerpack.serving.asking import CHAT, Asked
from layerpack.serving.fields import RequestError

_THINK, _THOUGHT = "<think>", "</think>"
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_CALLING = "<tool_call>"


@dataclass(slots=True)
class Said:
    """Parts of a text: what was thought before, what is said, and calls of tools."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


class Parts:
    """Tells the parts of a text apart while it comes.

    Models that think write <think>…</think> first (some templates open it in the prompt); models
    that call tools write JSON between <tool_call> and </tool_call>, as Hermes and Qwen do.
    """

    def __init__(self, *, has_tools: bool) -> None:
        self._has_tools = has_tools
        self._text = ""
        self._sent = Said()

    def put(self, piece: str, *, is_last: bool = False) -> Said:
        """What is new, and certain."""
        self._text += piece
        said = self._split(is_last)
        new = Said(
            content=said.content[len(self._sent.content) :],
            reasoning=said.reasoning[len(self._sent.reasoning) :],
            calls=said.calls[len(self._sent.calls) :],
        )
        self._sent = said
        return new

    def _split(self, is_last: bool) -> Said:
        rest, reasoning = self._text, ""
        begin = rest.lstrip()
        if not is_last and len(begin) < len(_THINK) and _THINK.startswith(begin):
            return self._sent
        if begin.startswith(_THINK):
            thought, closed, rest = begin[len(_THINK) :].partition(_THOUGHT)
            if not closed and not is_last:
                thought = _without_beginning_of(_THOUGHT, thought)
            reasoning = thought.strip("\n") if closed else thought.lstrip("\n")
            rest = rest.lstrip("\n") if closed else ""
        calls: list[dict[str, Any]] = []
        if self._has_tools:
            calls = [call for found in _CALL.finditer(rest) if (call := _call(found[1]))]
            if calls or (not is_last and _CALLING in rest):
                rest = rest[: rest.index(_CALLING)].rstrip("\n")
            elif not is_last:
                rest = _without_beginning_of(_CALLING, rest).rstrip("\n")
        if not rest.startswith(self._sent.content):  # line ends before a call were sent already
            rest = self._sent.content
        if not reasoning.startswith(self._sent.reasoning):
            reasoning = self._sent.reasoning
        return Said(content=rest, reasoning=reasoning, calls=calls)


def _without_beginning_of(mark: str, text: str) -> str:
    """The text but for an end that may become `mark`."""
    for count in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-count:]):
            return text[:-count]
    return text


def _call(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": found["name"], "arguments": arguments},
    }


class Teller:
    """Makes the JSON of one request's answer."""

    def __init__(self, asked: Asked, *, model: str, tokenizer: Any) -> None:
        self.asked, self._model, self._tokenizer = asked, model, tokenizer
        self._is_chat = asked.url == CHAT
        self._id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, done: Sequence[Generation]) -> dict[str, Any]:
        """All choices at once."""
        choices = [self._choice(index, one) for index, one in enumerate(done)]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(done), **_timings(done)}

    def _choice(self, index: int, done: Generation) -> dict[str, Any]:
        logprobs = self.logprobs(done.tokens)
        if not self._is_chat:
            reason = {"finish_reason": done.finish}
            return {"index": index, "text": done.text, "logprobs": logprobs, **reason}
        said = Parts(has_tools=self.asked.has_tools).put(done.text, is_last=True)
        message: dict[str, Any] = {"role": "assistant", "content": said.content or None}
        if not said.calls:
            message["content"] = said.content
        message |= _thought(said.reasoning)
        if said.calls:
            message["tool_calls"] = said.calls
        finish = "tool_calls" if said.calls and done.finish == "stop" else done.finish
        choice = {"index": index, "message": message, "logprobs": logprobs}
        return {**choice, "finish_reason": finish}

    def first(self, index: int) -> dict[str, Any] | None:
        """The piece with which a choice of a chat begins."""
        if not self._is_chat:
            return None
        return self._piece(index, {"role": "assistant", "content": ""}, None, None)

    def piece(self, index: int, new: Said, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """What is new of a choice; None if that is nothing."""
        logprobs = self.logprobs(tokens) if tokens else None
        if not self._is_chat:
            if not new.content and logprobs is None:
                return None
            return self._piece(index, new.content, logprobs, None)
        delta: dict[str, Any] = _thought(new.reasoning)
        if new.content or (logprobs is not None and not delta):
            delta["content"] = new.content
        if new.calls:
            delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(new.calls)]
        return self._piece(index, delta, logprobs, None) if delta else None

    def last(self, index: int, done: Generation, *, called: bool) -> dict[str, Any]:
        """How a choice ended."""
        finish = "tool_calls" if called and done.finish == "stop" else done.finish
        return self._piece(index, {} if self._is_chat else "", None, finish)

    def usage_piece(self, done: Sequence[Generation]) -> dict[str, Any]:
        """What it took, after all choices."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage(done), **_timings(done)}

    def _piece(self, index: int, new: Any, logprobs: Any, finish: str | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        what = {"delta": new} if self._is_chat else {"text": new}
        choice = {"index": index, **what, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head(kind), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created}
        return {**head, "model": self._model}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """OpenAI's JSON of tokens' log-probabilities; None if they were not asked for."""
        if not tokens or tokens[0].logprob is None:
            return None
        if self._is_chat:
            content = [
                {
                    **self._token(token.id, token.logprob),
                    "top_logprobs": [self._token(*other) for other in token.top],
                }
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        texts = [self._text(token.id) for token in tokens]
        offsets = [len("".join(texts[:place])) for place in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._text(one): logprob for one, logprob in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _thought(reasoning: str) -> dict[str, Any]:
    """Under both names that clients look for."""
    return {"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}


def usage(done: Sequence[Generation]) -> dict[str, Any]:
    """Tokens; of a prompt that has several choices the tokens are counted for each."""
    prompt = sum(one.prompt_tokens for one in done)
    completion = sum(len(one.token_ids) for one in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in done)},
    }


def _timings(done: Sequence[Generation]) -> dict[str, Any]:
    passes = sum(one.passes for one in done)
    seconds = sum(one.seconds for one in done)
    tokens = sum(len(one.token_ids) for one in done)
    decode = sum(one.decode_passes for one in done)
    return {
        "timings": {
            "passes": passes,
            "seconds_per_pass": round(seconds / passes, 4) if passes else None,
            "tokens_per_pass": round(tokens / decode, 3) if decode else None,
            "seconds": round(max((one.seconds for one in done), default=0.0), 3),
        }
    }


def refused(error: Exception) -> RequestError:
    """An error of the runtime as one that a client is told."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, PromptError):
        too_long = "context is" in str(error) or "set aside" in str(error)
        code = "context_length_exceeded" if too_long else None
        return RequestError(str(error), param="messages", code=code)
    text = str(error) if isinstance(error, LayerpackError) else f"unforeseen: {error!r}"
    return RequestError(text, status=500)
