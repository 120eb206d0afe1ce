"""From a prompt to text: chat template, sampling options, streaming, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from layerpack.formats.errors import PromptError, StreamError
from layerpack.runtime.needs import PREFILL_TOKENS

Message = Mapping[str, str]
"""`{"role": "user", "content": "…"}`, as chat templates take them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """`temperature` 0 is greedy decoding; `top_p`, `top_k` and `seed` matter above it only.

    `raw` sends a text as it is, without the chat template; `system` is a system message put
    before it. `prompt_lookup_tokens` proposes so many tokens per pass from repetitions of the
    prompt; `draft` is a smaller transformers model that proposes them. Both change how many
    tokens a pass gives, never which.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    raw: bool = False
    system: str | None = None
    prompt_lookup_tokens: int | None = None
    draft: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What came out. `finish` is stop (an end token), length, or interrupted.

    `passes` counts runs of the model, prefill included; `pass_s` their mean, in seconds;
    `first_pass_s` the first alone.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish: str
    passes: int
    seconds: float
    first_pass_s: float
    peak_vram_bytes: int

    @property
    def pass_s(self) -> float:
        """Mean seconds of a pass."""
        return self.seconds / self.passes if self.passes else 0.0


def run_generation(
    network: Any,
    tokenizer: Any,
    prompt: str | Sequence[Message],
    options: GenerateOptions,
    *,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """See `Model.generate`."""
    ids = encode_prompt(tokenizer, prompt, options).to(network.device)
    new_tokens = _room(network.config, ids.shape[1], options.max_new_tokens)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    if network.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(network.device)
    sink = _TextSink(tokenizer, on_text)
    finish = "length"
    with _count_passes(network) as passes:
        begin_s = time.perf_counter()
        try:
            network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=sink,
                **_arguments(network, tokenizer, options, ids.shape[1], new_tokens),
            )
        except KeyboardInterrupt:
            finish = "interrupted"
        except torch.OutOfMemoryError as error:
            raise StreamError(
                f"the device ran out of memory in a pass ({str(error).splitlines()[0]}); "
                "lower --context, or keep fewer layers resident with a lower --vram"
            ) from error
        seconds = time.perf_counter() - begin_s
    sink.flush()
    if finish == "length" and sink.token_ids and sink.token_ids[-1] in _end_ids(network):
        finish = "stop"
    return Generation(
        text=sink.text,
        token_ids=tuple(sink.token_ids),
        prompt_tokens=int(ids.shape[1]),
        finish=finish,
        passes=len(passes),
        seconds=seconds,
        first_pass_s=passes[0] if passes else 0.0,
        peak_vram_bytes=(
            torch.cuda.max_memory_allocated(network.device) if network.device.type == "cuda" else 0
        ),
    )


def encode_prompt(
    tokenizer: Any, prompt: str | Sequence[Message], options: GenerateOptions
) -> torch.Tensor:
    """Token ids (1, tokens). Raises PromptError if empty, or if there is no chat template."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("the prompt is empty; give some text with --prompt or on stdin")
        if options.raw:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            if not ids.shape[1]:
                raise PromptError("the prompt has no tokens; give some text")
            return torch.as_tensor(ids)
        messages: list[Message] = [{"role": "user", "content": prompt}]
    else:
        messages = list(prompt)
        if not messages:
            raise PromptError("the list of messages is empty")
    if options.system is not None:
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


def _room(config: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return max_new_tokens
    if prompt_tokens >= limit:
        raise PromptError(
            f"the prompt has {prompt_tokens} tokens, the model's context is {limit}; shorten it"
        )
    return min(max_new_tokens, int(limit) - prompt_tokens)


def _arguments(
    network: Any, tokenizer: Any, options: GenerateOptions, prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": options.temperature > 0,
        # A compiled forward would trace through the hooks that bring the weights.
        "disable_compile": True,
    }
    if network.generation_config.pad_token_id is None:
        arguments["pad_token_id"] = tokenizer.pad_token_id or next(iter(_end_ids(network)), 0)
    if options.temperature > 0:
        arguments |= {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
        }
    else:
        arguments |= {"temperature": None, "top_p": None, "top_k": None}
    if prompt_tokens > PREFILL_TOKENS:
        arguments["prefill_chunk_size"] = PREFILL_TOKENS
    if options.prompt_lookup_tokens is not None:
        arguments["prompt_lookup_num_tokens"] = options.prompt_lookup_tokens
    if options.draft is not None:
        arguments["assistant_model"] = options.draft
    return arguments


def _end_ids(network: Any) -> set[int]:
    ends = network.generation_config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, (list, tuple)) else {int(ends)}


@contextmanager
def _count_passes(network: Any) -> Iterator[list[float]]:
    """Host seconds of each forward of the whole model, in order."""
    passes: list[float] = []
    begin_s = [0.0]

    def before(*_: Any) -> None:
        begin_s[0] = time.perf_counter()

    def after(*_: Any) -> None:
        passes.append(time.perf_counter() - begin_s[0])

    hooks = [network.register_forward_pre_hook(before), network.register_forward_hook(after)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


class _TextSink:
    """transformers' streamer protocol: collects ids, and hands on text that cannot change any more.

    A token may hold part of a character, and decoding is not token by token: text is held back
    while it ends in a replacement character, and while its last word may still grow.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self.token_ids: list[int] = []
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._prompt_seen = False
        self._sent = 0

    @property
    def text(self) -> str:
        """All text so far."""
        return str(self._tokenizer.decode(self.token_ids, skip_special_tokens=True))

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt's ids first, then with each new token or run of tokens."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.token_ids += value.reshape(-1).tolist()
        if self._on_text is not None:
            text = self.text
            if not text.endswith("\ufffd"):
                self._send(text)

    def end(self) -> None:
        """Called when generation is over."""

    def flush(self) -> None:
        """Hand on what was held back."""
        if self._on_text is not None:
            self._send(self.text)

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            assert self._on_text is not None
            self._on_text(text[self._sent :])
            self._sent = len(text)
