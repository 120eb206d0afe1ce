"""Thoughts, text and calls of tools are told apart alike, however the text is cut into pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerpack.serving.asking import asked_of
from layerpack.serving.fields import RequestError
from layerpack.serving.telling import Parts, Said

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "time", "arguments": "{}"}</tool_call>'
TEXTS = {
    "plain": ("Hello <b>there</b>.", ("Hello <b>there</b>.", "", [])),
    "thought": ("<think>\nIs it?\n</think>\n\nYes.", ("Yes.", "Is it?", [])),
    "unended thought": ("<think>so <i>on", ("", "so <i>on", [])),
    "one call": (f"I look.\n{CALL}", ("I look.", "", ["weather"])),
    "two calls": (f"{CALL}\n{OTHER}", ("", "", ["weather", "time"])),
    "thought and call": (f"<think>Hm</think>{CALL}", ("", "Hm", ["weather"])),
    "no call": ("<tool_call>{broken</tool_call>", ("<tool_call>{broken</tool_call>", "", [])),
    "an end like a mark": ("a <tool_", ("a <tool_", "", [])),
}


def in_pieces(text: str, cuts: list[int]) -> Said:
    parts, whole = Parts(has_tools=True), Said()
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for begin, end in itertools.pairwise(places):
        new = parts.put(text[begin:end])
        whole.content += new.content
        whole.reasoning += new.reasoning
        whole.calls += new.calls
    new = parts.put("", is_last=True)
    whole.content += new.content
    whole.reasoning += new.reasoning
    whole.calls += new.calls
    return whole


@pytest.mark.parametrize("name", TEXTS)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_parts_of_a_text(name: str, cuts: list[int]) -> None:
    text, (content, reasoning, calls) = TEXTS[name]
    said = in_pieces(text, cuts)
    assert (said.content.strip(), said.reasoning.strip()) == (content, reasoning)
    assert [call["function"]["name"] for call in said.calls] == calls
    for call in said.calls:
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_without_tools_a_call_is_text() -> None:
    assert Parts(has_tools=False).put(CALL, is_last=True).content == CALL


def test_tools_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "tools": [tool]}
    asked = asked_of("/v1/chat/completions", body, default_tokens=9)
    ((_, options),) = asked.prompts
    assert asked.has_tools and options.template_arguments == {"tools": [tool]}
    asked = asked_of("/v1/chat/completions", body | {"tool_choice": "none"}, default_tokens=9)
    assert not asked.has_tools
    with pytest.raises(RequestError, match="required"):
        asked_of("/v1/chat/completions", body | {"tool_choice": "required"}, default_tokens=9)


def test_each_choice_has_a_seed_of_its_own() -> None:
    body = {"prompt": ["a", "b"], "n": 2, "seed": 5}
    asked = asked_of("/v1/completions", body, default_tokens=9)
    assert [options.seed for _, options in asked.prompts] == [5, 6, 5, 6]
