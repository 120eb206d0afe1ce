"""From the JSON of /v1/chat/completions and /v1/completions to prompts and options.

What would change the answer and is not supported is refused by its name; nothing is left out
without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerpack.formats.errors import LayerpackError
from layerpack.runtime.engine.options import SEEDS, GenerateOptions
from layerpack.runtime.requests.answer import Prompt
from layerpack.serving.fields import Fields, RequestError, object_of, shown

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_MOST_CHOICES, _MOST_STOPS, _MOST_TOKENS = 16, 16, 1 << 24
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SAID = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request: each of `prompts` is to be answered with its options, as one choice each.

    `has_tools`: the answer may call tools. `thinks`: the template lets the model think.
    """

    url: str
    model: str | None
    prompts: tuple[tuple[Prompt, GenerateOptions], ...]
    stream: bool
    include_usage: bool
    has_tools: bool


def asked_of(url: str, body: Any, *, default_tokens: int, seed: int | None = None) -> Asked:
    """What a body posted to `url` asks for. Raises RequestError.

    `default_tokens` is the most that an answer has unless the request says so; `seed` is what is
    sampled with unless it does.
    """
    fields = Fields(body)
    model = fields.take("model")
    if model is not None and not isinstance(model, str):
        raise RequestError(f"model: a name was expected, not {shown(model)}", param="model")
    if url == CHAT:
        prompts, options = _chat(fields)
    elif url == COMPLETIONS:
        prompts, options = _completions(fields)
    else:
        raise RequestError(f"there is no {shown(url)}; ask {CHAT} or {COMPLETIONS}", status=404)
    tokens = fields.whole("max_tokens", None, 1, _MOST_TOKENS)
    if url == CHAT:
        tokens = fields.whole("max_completion_tokens", tokens, 1, _MOST_TOKENS)
    options |= {"max_new_tokens": tokens or default_tokens, **_sampling(fields, seed)}
    num_choices = fields.whole("n", 1, 1, _MOST_CHOICES) or 1
    stream = fields.flag("stream")
    include_usage = _stream_options(fields, stream)
    fields.ignore("user", "metadata", "store", "service_tier", "safety_identifier")
    fields.ignore("prompt_cache_key")
    fields.only("logit_bias", ({},), "leave it out")
    fields.end()
    try:
        usual = GenerateOptions(**options)
    except LayerpackError as reason:  # what the fields' bounds do not say
        raise RequestError(str(reason)) from reason
    each = [(prompt, _numbered(usual, n)) for prompt in prompts for n in range(num_choices)]
    return Asked(
        url=url,
        model=model,
        prompts=tuple(each),
        stream=stream,
        include_usage=include_usage,
        has_tools="tools" in (usual.template_arguments or {}),
    )


def _numbered(options: GenerateOptions, number: int) -> GenerateOptions:
    """The options of choice `number`: with a seed, each has its own."""
    if options.seed is None or not number:
        return options
    return replace(options, seed=(options.seed + number) % SEEDS)


def _chat(fields: Fields) -> tuple[list[Prompt], dict[str, Any]]:
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: a list with something in it was expected", param="messages")
    prompt = [_message(message, number) for number, message in enumerate(messages)]
    arguments = dict(object_of(fields.take("chat_template_kwargs") or {}, "chat_template_kwargs"))
    tools = fields.take("tools")
    if tools is not None and not (isinstance(tools, list) and all(map(_is_tool, tools))):
        raise RequestError("tools: a list of functions was expected", param="tools")
    choice = fields.take("tool_choice")
    if choice not in (None, "auto", "none"):
        raise RequestError(
            f"tool_choice: {shown(choice)} cannot be promised; auto or none can",
            param="tool_choice",
        )
    if tools and choice != "none":
        arguments["tools"] = tools
    fields.only("parallel_tool_calls", (True,), "the model decides how many tools it calls")
    fields.only("response_format", ({"type": "text"},), "answers are text")
    fields.only("modalities", (["text"],), "answers are text")
    fields.only("reasoning_effort", (), "chat_template_kwargs can turn thinking on and off")
    top = fields.whole("top_logprobs", None, 0, 20)
    if fields.flag("logprobs"):
        top = top or 0
    elif top is not None:
        raise RequestError("top_logprobs: goes with logprobs: true", param="top_logprobs")
    return [prompt], {"template_arguments": arguments or None, "top_logprobs": top}


def _completions(fields: Fields) -> tuple[list[Prompt], dict[str, Any]]:
    prompt = fields.take("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise RequestError("prompt: a text, or a list of texts, was expected", param="prompt")
    if len(prompts) > _MOST_CHOICES:
        raise RequestError(f"prompt: at most {_MOST_CHOICES} at a time", param="prompt")
    fields.only("echo", (False,), "the prompt is not said again")
    fields.only("suffix", ("",), "nothing can be put behind an answer")
    fields.only("best_of", (1,), "ask for n answers, and choose")
    return list(prompts), {"raw": True, "top_logprobs": fields.whole("logprobs", None, 0, 5)}


def _sampling(fields: Fields, seed: int | None) -> dict[str, Any]:
    stop = fields.take("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if (
        not isinstance(stops, list)
        or len(stops) > _MOST_STOPS
        or not all(isinstance(text, str) and text for text in stops)
    ):
        raise RequestError(
            f"stop: a text, or a list of up to {_MOST_STOPS} of them, was expected", param="stop"
        )
    return {
        "temperature": fields.number("temperature", 1.0, 0, 100),
        "top_p": fields.number("top_p", 1.0, 1e-9, 1),
        "top_k": max(0, fields.whole("top_k", 0, -1, 1 << 24) or 0),
        "min_p": fields.number("min_p", 0.0, 0, 1),
        "seed": fields.whole("seed", seed, 0, SEEDS - 1),
        "stop": tuple(stops),
        "presence_penalty": fields.number("presence_penalty", 0.0, -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -2, 2),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 1e-3, 1e3),
    }


def _stream_options(fields: Fields, stream: bool) -> bool:
    found = fields.take("stream_options")
    if found is None:
        return False
    if not stream:
        raise RequestError("stream_options: goes with stream: true", param="stream_options")
    inner = Fields(object_of(found, "stream_options"))
    include = inner.flag("include_usage")
    inner.ignore("include_obfuscation")
    inner.end()
    return include


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _message(message: Any, number: int) -> Mapping[str, Any]:
    where = f"messages[{number}]"
    # null is as if it were not there, as clients have it that send back what they were told.
    said = {k: v for k, v in object_of(message, where).items() if v is not None}
    if said.get("role") not in _ROLES:
        raise RequestError(
            f"{where}.role: {shown(said.get('role'))} is none of {', '.join(_ROLES)}",
            param="messages",
        )
    if other := sorted(set(map(str, said)) - set(_SAID)):
        raise RequestError(f"{where}.{other[0]}: leave it out", param="messages")
    if said["role"] == "developer":
        said["role"] = "system"
    said["content"] = _text(said.get("content"), where)
    return said


def _text(content: Any, where: str) -> str:
    """A text, or texts in parts, as one."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise RequestError(
        f"{where}.content: text was expected; images and sounds cannot be read", param="messages"
    )
