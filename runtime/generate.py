"""From a prompt to text: chat template, sampling options, streaming, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from layerpack.formats.errors import PromptError, StreamError
from layerpack.runtime.core.device_errors import device_errors
from layerpack.runtime.engine.draft import Draft
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.passes import StepClock, continued, count_proposed, note_passes
from layerpack.runtime.engine.prompt import Message, encode_prompt, tokens_left
from layerpack.runtime.engine.text_sink import TextSink
from layerpack.runtime.network.exact import token_by_token
from layerpack.runtime.plan.needs import PREFILL_TOKENS
from layerpack.runtime.trace.trace import NO_TRACE, Trace

_LEAST_TEMPERATURE = 1e-30  # logits over less than that are infinite, and their softmax is not


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What came out. `finish` is stop (an end token), length, or interrupted.

    `passes` counts runs of the model, prefill included; `pass_s` their mean, in seconds, a
    draft's time included; `first_pass_s` the first alone. `decode_passes` are those that gave
    tokens: all but the first ones of a long prompt. Of `proposed_tokens`, by a draft or prompt
    lookup, `accepted_tokens` were right.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish: str
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
    tokenizer: Any,
    prompt: str | Sequence[Message],
    options: GenerateOptions,
    *,
    layers_path: str,
    reserved_tokens: int | None = None,
    draft: Draft | None = None,
    on_text: Callable[[str], None] | None = None,
    trace: Trace = NO_TRACE,
) -> Generation:
    """See `Model.generate`; the decoder layers are at `layers_path` of `network`.

    `reserved_tokens` is the most that memory was set aside for, None if it was not.
    """
    if draft is not None and options.prompt_lookup_tokens is not None and options.draft_tokens:
        raise PromptError("a draft and prompt lookup exclude each other; ask for one of them")
    ids = encode_prompt(tokenizer, prompt, options).to(network.device)
    new_tokens = tokens_left(
        int(ids.shape[1]),
        options.max_new_tokens,
        limit=getattr(network.config.get_text_config(), "max_position_embeddings", None),
        reserved=reserved_tokens,
    )
    if options.seed is not None:
        torch.manual_seed(options.seed)
    if network.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(network.device)
    begin_s = time.perf_counter()  # before the first step begins: together they take no longer
    steps = StepClock(trace)
    sink = TextSink(tokenizer, on_text, on_ids=steps.tokens_known)
    finish = "length"
    proposing = _proposing_arguments(options, draft)
    exactly = proposing and options.exact and options.temperature == 0
    with note_passes(network, steps) as passes:
        try:
            _run(
                network,
                ids,
                sink,
                steps,
                new_tokens=new_tokens,
                arguments=_arguments(network, tokenizer, options, int(ids.shape[1])),
                proposing=proposing,
                exact_path=layers_path if exactly else None,
            )
        except KeyboardInterrupt:
            finish = "interrupted"
        except torch.OutOfMemoryError as error:
            raise StreamError(
                f"the device ran out of memory in a pass ({str(error).splitlines()[0]}); "
                "lower --context, or keep fewer layers resident with a lower --vram"
            ) from error
        seconds = time.perf_counter() - begin_s
    trace.clock.finish()
    if finish == "length" and sink.token_ids and sink.token_ids[-1] in _end_ids(network):
        finish = "stop"
    decode_passes, proposed = count_proposed(passes, int(ids.shape[1]))
    return Generation(
        text=sink.text,
        token_ids=tuple(sink.token_ids),
        prompt_tokens=int(ids.shape[1]),
        finish=finish,
        passes=len(passes),
        decode_passes=decode_passes,
        proposed_tokens=proposed,
        seconds=seconds,
        first_pass_s=passes[0].seconds if passes else 0.0,
        peak_vram_bytes=(
            torch.cuda.max_memory_allocated(network.device) if network.device.type == "cuda" else 0
        ),
    )


def _run(
    network: Any,
    ids: torch.Tensor,
    sink: TextSink,
    steps: StepClock,
    *,
    new_tokens: int,
    arguments: dict[str, Any],
    proposing: dict[str, Any],
    exact_path: str | None,
) -> None:
    """All passes. With proposals the prompt still goes first, as ever, and gives one token.

    Assisted generation would put prompt and proposals into one pass of any length.
    """
    from layerpack.runtime.kv.reserved import reserved_cache

    cache = reserved_cache(network.config, int(ids.shape[1]) + new_tokens)
    common = {"streamer": sink, **arguments}
    if not proposing or new_tokens == 1:
        network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            **common,
        )
        return
    begun = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=1,
        return_dict_in_generate=True,
        **common,
    )
    if sink.token_ids[-1] in _end_ids(network):
        return
    sink.expect_prompt()
    steps.proposing = True
    exactly = nullcontext() if exact_path is None else token_by_token(network, exact_path)
    with continued(network), exactly:
        network.generate(
            begun.sequences,
            attention_mask=torch.ones_like(begun.sequences),
            past_key_values=begun.past_key_values,
            max_new_tokens=new_tokens - 1,
            **common,
            **proposing,
        )


def _proposing_arguments(options: GenerateOptions, draft: Draft | None) -> dict[str, Any]:
    if options.prompt_lookup_tokens is not None:
        return {"prompt_lookup_num_tokens": options.prompt_lookup_tokens}
    if draft is not None and options.draft_tokens:
        return draft.arguments(options.draft_tokens)
    return {}


def _arguments(
    network: Any, tokenizer: Any, options: GenerateOptions, prompt_tokens: int
) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "do_sample": options.temperature > 0,
        # A compiled forward would trace through the hooks that bring the weights.
        "disable_compile": True,
    }
    if network.generation_config.pad_token_id is None:
        arguments["pad_token_id"] = tokenizer.pad_token_id or next(iter(_end_ids(network)), 0)
    if options.temperature > 0:
        arguments |= {
            "temperature": max(options.temperature, _LEAST_TEMPERATURE),
            "top_p": options.top_p,
            "top_k": options.top_k,
        }
    else:
        arguments |= {"temperature": None, "top_p": None, "top_k": None}
    if prompt_tokens > PREFILL_TOKENS:
        arguments["prefill_chunk_size"] = PREFILL_TOKENS
    return arguments


def _end_ids(network: Any) -> set[int]:
    ends = network.generation_config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, (list, tuple)) else {int(ends)}
