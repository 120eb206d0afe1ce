"""From a prompt to token ids, and how many more may follow them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from layerpack.formats.errors import PromptError
from layerpack.formats.text import require_utf8

if TYPE_CHECKING:
    from layerpack.runtime.engine.options import GenerateOptions

_SHORT_BYTES, _END_TOKENS, _TEMPLATE_TOKENS = 512, 2, 128
Message = Mapping[str, str]
"""`{"role": "user", "content": "…"}`, as chat templates take them."""


def encode_prompt(
    tokenizer: Any, prompt: str | Sequence[Message], options: GenerateOptions
) -> torch.Tensor:
    """Token ids (1, tokens).

    Raises PromptError if the prompt is empty or not UTF-8, if there is no chat template, or if raw
    text comes with a system message.
    """
    if isinstance(prompt, str):
        require_utf8(prompt, "the prompt")
        if not prompt.strip():
            raise PromptError("the prompt is empty; give some text with --prompt or on stdin")
        if options.raw:
            return _raw_ids(tokenizer, prompt, options)
        messages: list[Message] = [{"role": "user", "content": prompt}]
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
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("this model has no chat template; use --raw for plain text")
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # templates are programs of their own and raise what they like
        line = (str(error).splitlines() or [repr(error)])[0]
        raise PromptError(f"the model's chat template refused the messages: {line}") from error
    return torch.as_tensor(encoded["input_ids"])


def _raw_ids(tokenizer: Any, prompt: str, options: GenerateOptions) -> torch.Tensor:
    if options.system is not None:
        raise PromptError("a system message goes into the chat template, raw text does not")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not ids.shape[1]:
        raise PromptError("the prompt has no tokens; give some text")
    return torch.as_tensor(ids)


def most_tokens(prompt: str, options: GenerateOptions) -> int | None:
    """A bound for the tokens of a short prompt, before there is a tokenizer; None if it is long.

    Of a text tokenizers make no more tokens than it has bytes, but for one at either end. What chat
    templates add is their own: some dozens. The bound may be wrong for an unusual one.
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
