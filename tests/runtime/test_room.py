"""Memory is set aside for a prompt before its tokens are counted; the count has the last word."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerpack.convert.api import convert
from layerpack.formats.errors import PromptError
from layerpack.formats.pack import Pack
from layerpack.runtime import GenerateOptions, Model, OpenOptions
from layerpack.runtime.engine.prompt import encode_prompt, most_tokens
from layerpack.runtime.room import tokens_needed
from layerpack.runtime.tokenizer import load_tokenizer

PackOf = Callable[..., Path]
_WITHOUT_TRANSFORMERS = """
import sys, threading
from layerpack.runtime import Model, OpenOptions, opening
from layerpack.runtime.stream.store import Store

def note(self, **options):
    begun.set()
    build(self, **options)

def tokenizer(pack):
    print("weights begun", begun.wait(30), "transformers", "transformers" in sys.modules)
    return load(pack)

begun = threading.Event()
build, Store.__init__ = Store.__init__, note
load, opening._tokenizer = opening._tokenizer, tokenizer
with Model.open(sys.argv[1], OpenOptions(device="cpu")):
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
    assert len(ids) <= bound


def test_what_is_set_aside(pack_of: PackOf) -> None:
    """A bound within the model's context (256), or a count."""
    pack = Pack.open(pack_of("llama"))
    wanted = GenerateOptions(max_new_tokens=10, raw=True)
    assert tokens_needed(pack, "hello", wanted) == 5 + 2 + 10
    assert tokens_needed(pack, "hello", GenerateOptions(max_new_tokens=200)) == 256
    assert tokens_needed(pack, "x" * 600, wanted) == 256


def test_a_template_longer_than_any_is_refused_with_the_remedy(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    convert(str(checkpoint_of("llama", max_position_embeddings=4096)), tmp_path / "wordy")
    template = tmp_path / "wordy" / "chat_template.jinja"
    template.write_text("x" * 1500 + template.read_text())
    pack, wanted = Pack.open(tmp_path / "wordy"), GenerateOptions(max_new_tokens=8)
    options = OpenOptions(device="cpu", context_tokens=tokens_needed(pack, "hello", wanted))
    with (
        Model.open(pack, options) as model,
        pytest.raises(PromptError, match=r"set aside for \d+; .* \(--context\)"),
    ):
        model.generate("hello", wanted)
    with Model.open(pack, OpenOptions(device="cpu", context_tokens=2000)) as model:
        assert model.generate("hello", wanted).prompt_tokens > 1500


def test_weights_are_on_their_way_before_transformers_is_imported(pack_of: PackOf) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TRANSFORMERS, str(pack_of("llama"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "weights begun True transformers False\nopen\n"


@functools.cache
def _tokenizer(path: Path) -> Any:
    return load_tokenizer(path)
