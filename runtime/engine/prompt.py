"""From a prompt to token ids, and how many more may follow them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from layerpack.formats.errors import PromptError
from layerpack.formats.text import first_line, require_utf8
from layerpack.runtime.engine.options import GenerateOptions

_SHORT_BYTES, _END_TOKENS, _TEMPLATE_TOKENS = 512, 2, 1024
_FOR_TEMPLATES = {"tools", "documents"}
Message = Mapping[str, str]
"""`{"role": "user", "content": "…"}`, as chat templates take them."""


def encode_prompt(
    tokenizer: Any,
    prompt: str | Sequence[Message],
    options: GenerateOptions,
    *,
    embedding_rows: int | None = None,
) -> list[int]:
    """Token ids.

    Raises PromptError if the prompt is empty or not UTF-8, if there is no chat template, if raw
    text comes with what goes into one, or a token is beyond the model's `embedding_rows`.
    """
    if isinstance(prompt, str):
        require_utf8(prompt, "the prompt")
        if not prompt.strip():
            raise PromptError("the prompt is empty; give some text with --prompt or on stdin")
    if options.raw:
        ids = _raw_ids(tokenizer, prompt, options)
    else:
        ids = _templated_ids(tokenizer, _messages(prompt, options), options)
    if embedding_rows is not None and max(ids) >= embedding_rows:
        token = max(ids)
        raise PromptError(
            f"the tokenizer makes token {token} of the prompt "
            f"({tokenizer.convert_ids_to_tokens(token)!r}), but the model's embedding ends at "
            f"{embedding_rows - 1}; leave it out, or use the tokenizer that the model was trained "
            "with"
        )
    return ids


def _messages(prompt: str | Sequence[Message], options: GenerateOptions) -> list[Message]:
    messages: list[Message]
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = list(prompt)
        if not messages:
            raise PromptError("the list of messages is empty")
        for number, message in enumerate(messages, start=1):
            for text in message.values():
                if isinstance(text, str):  # some templates take lists of parts as well
                    require_utf8(text, f"message {number}")
    if options.system is not None:
        require_utf8(options.system, "the system message")
        messages = [{"role": "system", "content": options.system}, *messages]
    return messages


def _templated_ids(tokenizer: Any, messages: list[Message], options: GenerateOptions) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("this model has no chat template; use --raw for plain text")
    arguments = options.template_arguments or {}
    known = set(inspect.signature(tokenizer.apply_chat_template).parameters) - _FOR_TEMPLATES
    if ours := sorted(known & arguments.keys()):
        raise PromptError(f"template argument {ours[0]}: no chat template gets that; leave it out")
    try:
        encoded = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_dict=True,
            **arguments,
        )
    except Exception as error:  # templates are programs of their own and raise what they like
        raise PromptError(
            f"the model's chat template refused the messages: {first_line(error)}"
        ) from error
    return _some(encoded["input_ids"])


def _raw_ids(
    tokenizer: Any, prompt: str | Sequence[Message], options: GenerateOptions
) -> list[int]:
    if options.system is not None or options.template_arguments:
        what = "a system message goes" if options.system is not None else "template arguments go"
        raise PromptError(f"{what} into the chat template, raw text does not")
    if not isinstance(prompt, str):
        raise PromptError("messages go into the chat template, raw text does not; give one text")
    return _some(tokenizer(prompt).input_ids)


def _some(ids: Sequence[int]) -> list[int]:
    if not len(ids):
        raise PromptError("the prompt has no tokens; give some text")
    return [int(token) for token in ids]


def most_tokens(prompt: str, options: GenerateOptions) -> int | None:
    """A bound for the tokens of a short prompt, before there is a tokenizer; None if it is long.

    Of a text tokenizers make no more tokens than it has bytes, but for one at either end. What chat
    templates add is their own: dozens mostly, hundreds for some. The bound may be wrong for an
    unusual one.
    """
    length_bytes = len((prompt + (options.system or "")).encode())
    if length_bytes > _SHORT_BYTES:
        return None
    return length_bytes + (_END_TOKENS if options.raw else _TEMPLATE_TOKENS)


def tokens_left(
    prompt_tokens: int, max_new_tokens: int, *, limit: int | None, reserved: int | None = None
) -> int:
    """How many tokens may follow a prompt: `max_new_tokens`, or fewer at the context's end.

    `limit` is the model's context, `reserved` the tokens that memory was set aside for; None
    where there is no bound. Raises PromptError if there is room for none.
    """
    if limit is not None and prompt_tokens >= limit:
        raise PromptError(
            f"the prompt has {prompt_tokens} tokens, the model's context is {limit}; shorten it"
        )
    if reserved is not None and prompt_tokens >= reserved:
        raise PromptError(
            f"the prompt has {prompt_tokens} tokens, memory was set aside for {reserved}; "
            "open the model with a larger context (--context)"
        )
    bounds = [bound - prompt_tokens for bound in (limit, reserved) if bound is not None]
    return min([max_new_tokens, *bounds])
