"""Memory is set aside for a prompt before its tokens are counted; the count has the last word."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerpack.cli.generate_room import Room, open_with_room
from layerpack.convert.api import convert
from layerpack.formats.errors import PromptError
from layerpack.formats.pack import Pack
from layerpack.runtime import GenerateOptions, Model, OpenOptions
from layerpack.runtime.engine.draft import Draft, load_draft
from layerpack.runtime.engine.prompt import encode_prompt, most_tokens
from layerpack.runtime.tokenizer import load_tokenizer
from layerpack.runtime.trace.trace import NO_TRACE

PackOf = Callable[..., Path]
_WITHOUT_TRANSFORMERS = """
import sys, threading
from layerpack.runtime import Model, OpenOptions
from layerpack.runtime.network.weights import Weights

def note(self, **options):
    begun.set()
    build(self, **options)

def meanwhile():
    print("weights begun", begun.wait(30), "transformers", "transformers" in sys.modules)

begun = threading.Event()
build, Weights.__init__ = Weights.__init__, note
with Model.open(sys.argv[1], OpenOptions(device="cpu"), meanwhile=meanwhile):
    print("open")
"""


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(min_size=1, max_size=300), raw=st.booleans())
def test_a_short_prompt_has_no_more_tokens_than_its_bound(
    smollm2_checkpoint: Path, prompt: str, raw: bool
) -> None:
    wanted = GenerateOptions(raw=raw)
    bound = most_tokens(prompt, wanted)
    if bound is None:
        assert len(prompt.encode()) > 512
        return
    try:
        ids = encode_prompt(_tokenizer(smollm2_checkpoint), prompt, wanted)
    except PromptError:
        return  # nothing but white space, or nothing that the tokenizer sees
    assert ids.shape[1] <= bound


def test_what_is_set_aside(pack_of: PackOf) -> None:
    """The user's word, else a bound within the model's context (256), else a count."""
    pack = Pack.open(pack_of("llama"))
    wanted = GenerateOptions(max_new_tokens=10, raw=True)
    assert Room(pack, "hello", wanted, reserved=77).context_tokens == 77
    assert Room(pack, "hello", wanted, reserved=None).context_tokens == 5 + 2 + 10
    chat = GenerateOptions(max_new_tokens=200)
    assert Room(pack, "hello", chat, reserved=None).context_tokens == 256
    with pytest.raises(PromptError, match="the prompt has 600 tokens, the model's context is 256"):
        Room(pack, "x" * 600, wanted, reserved=None)


def test_new_tokens_end_where_the_context_does(pack_of: PackOf) -> None:
    pack = Pack.open(pack_of("llama"))
    wanted = GenerateOptions(max_new_tokens=1000, raw=True)
    assert Room(pack, "hello", wanted, reserved=None).wanted.max_new_tokens == 256 - 5
    assert Room(pack, "hello", wanted, reserved=40).wanted.max_new_tokens == 40 - 5


def test_a_template_longer_than_any_is_given_its_room(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    wordy = tmp_path / "wordy"
    convert(str(checkpoint_of("llama", max_position_embeddings=4096)), wordy)
    template = wordy / "chat_template.jinja"
    template.write_text("x" * 1000 + template.read_text())
    wanted = GenerateOptions(max_new_tokens=8)
    pack = Pack.open(wordy)
    room = Room(pack, "hello", wanted, reserved=None)
    assert room.context_tokens < 200
    with ExitStack() as stack:
        opening = OpenOptions(device="cpu", context_tokens=room.context_tokens)
        model = open_with_room(stack, pack, opening, room, NO_TRACE)
        assert model.plan.needs.cache_bytes > 0
        assert model.generate("hello", room.wanted).prompt_tokens > 1000


def test_one_draft_at_a_time_is_in_memory(
    pack_of: PackOf, checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first opening's is gone before the second one loads its own."""
    pack = Pack.open(pack_of("llama"))
    room = Room(pack, "hello", GenerateOptions(max_new_tokens=8), reserved=None)
    monkeypatch.setattr(room, "context_tokens", 10)
    drafts: list[weakref.ref[Any]] = []

    def noted(name: str, **where: Any) -> Draft:
        assert [draft for draft in drafts if draft() is not None] == []
        draft = load_draft(name, **where)
        drafts.append(weakref.ref(draft.network))
        return draft

    monkeypatch.setattr("layerpack.runtime.open_draft.load_draft", noted)
    opening = OpenOptions(device="cpu", context_tokens=10, draft=str(checkpoint_of("llama")))
    with ExitStack() as stack:
        gc.disable()  # as the command does while it opens
        stack.callback(gc.enable)
        open_with_room(stack, pack, opening, room, NO_TRACE)
    assert len(drafts) == 2


def test_weights_are_on_their_way_before_transformers_is_imported(pack_of: PackOf) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TRANSFORMERS, str(pack_of("llama"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "weights begun True transformers False\nopen\n"


def test_what_fails_meanwhile_ends_the_opening(pack_of: PackOf) -> None:
    with (
        pytest.raises(PromptError, match="no"),
        Model.open(pack_of("llama"), OpenOptions(device="cpu"), meanwhile=_refuse),
    ):
        pytest.fail("it is open")


@functools.cache
def _tokenizer(path: Path) -> Any:
    return load_tokenizer(path)


def _refuse() -> None:
    raise PromptError("no")
