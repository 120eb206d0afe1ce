"""Text as it comes: whole characters only, to a callback or through an iterator."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.models.tiny import save_tokenizer
from support.runs.cpu import FROM_DISK, MAPPED, logits_of
from support.runs.faults import nothing_left, threads

from layerpack.formats.errors import PromptError
from layerpack.runtime import GenerateOptions, Model, OpenOptions
from layerpack.runtime.engine.prompt import Message, encode_prompt
from layerpack.runtime.engine.text_sink import TextSink
from layerpack.runtime.tokenizer import load_tokenizer

PackOf = Callable[..., Path]
TEXT = "naïve 😀 — «déjà vu» 漢字 👩‍🚀!"


def fed(path: Path, ids: list[int], run_length: int) -> tuple[list[str], TextSink]:
    pieces: list[str] = []
    sink = TextSink(load_tokenizer(path))
    for first in range(0, len(ids), run_length):
        pieces.append(sink.put(ids[first : first + run_length]))
    return list(filter(None, pieces)), sink


@pytest.mark.parametrize("run_length", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (["never"], TEXT),
        (["😀 — no"], TEXT),
        (["— «"], "naïve 😀 "),
        (["漢字", "déjà", "vu» 漢"], "naïve 😀 — «"),
        (["n"], ""),
        (["!"], TEXT[:-1]),
    ],
)
def test_a_text_ends_before_the_first_stop_string(
    tmp_path: Path, run_length: int, stop: list[str], wanted: str
) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids, sink, pieces = tokenizer(TEXT).input_ids, TextSink(tokenizer, stop), list[str]()
    for first in range(0, len(ids), run_length):
        pieces.append(sink.put(ids[first : first + run_length]))
        if sink.stopped:
            break
    assert sink.stopped == (wanted != TEXT)
    pieces.append(sink.rest())
    assert "".join(pieces) == sink.text == wanted


@pytest.mark.parametrize("run_length", [1, 2, 5])
def test_a_character_split_over_tokens_comes_whole(tmp_path: Path, run_length: int) -> None:
    save_tokenizer(tmp_path)
    ids = load_tokenizer(tmp_path)(TEXT).input_ids
    assert len(ids) == len(TEXT.encode())  # a token a byte
    pieces, sink = fed(tmp_path, ids, run_length)
    assert "".join(pieces) == sink.text == TEXT
    assert not [piece for piece in pieces if "\ufffd" in piece or not piece]
    assert sink.token_ids == ids


def test_half_a_character_at_the_end_is_left_out(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    ids = load_tokenizer(tmp_path)("so 😀").input_ids[:-1]
    pieces, sink = fed(tmp_path, ids, 1)
    assert "".join(pieces) == sink.text == "so "
    assert sink.token_ids == ids


def test_streaming_gives_the_text(pack_of: PackOf) -> None:
    wanted = GenerateOptions(max_new_tokens=20)
    with Model.open(pack_of("llama"), OpenOptions(device="cpu")) as model:
        whole = model.generate("hello", wanted).text
        assert "".join(model.stream("hello", wanted)) == whole
        pieces = model.stream("hello", GenerateOptions(max_new_tokens=200))
        assert next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        with pytest.raises(PromptError, match="empty"):
            list(model.stream(""))
        assert model.generate("hello", wanted).text == whole


@pytest.mark.parametrize("options", [MAPPED, FROM_DISK], ids=["mapped", "disk"])
def test_closing_the_model_ends_what_is_kept_of_a_stream(pack: Path, options: OpenOptions) -> None:
    """The frames of an error that left a loop keep it, without anybody's doing."""
    logits_of(pack, options)
    with nothing_left(pack):
        with pytest.raises(ZeroDivisionError), Model.open(pack, options) as model:
            pieces = model.stream("hello", GenerateOptions(max_new_tokens=200))
            for _ in pieces:
                raise ZeroDivisionError
        assert threads() == []
        assert len(list(pieces)) < 150  # what had come by then; nothing more does


@pytest.mark.parametrize(
    ("prompt", "wanted", "where"),
    [
        ("a\udcff", GenerateOptions(), "the prompt"),
        ("a\udcff", GenerateOptions(raw=True), "the prompt"),
        ("a", GenerateOptions(system="\ud800"), "the system message"),
        ([{"role": "user", "content": "\udcff"}], GenerateOptions(), "message 1"),
    ],
)
def test_text_that_is_not_utf8_is_refused(
    pack_of: PackOf, prompt: str | list[Message], wanted: GenerateOptions, where: str
) -> None:
    with pytest.raises(PromptError, match=f"{where} is not UTF-8 text"):
        encode_prompt(load_tokenizer(pack_of("llama")), prompt, wanted)


def test_raw_text_takes_no_system_message(pack_of: PackOf) -> None:
    with pytest.raises(PromptError, match="a system message goes into the chat template"):
        encode_prompt(load_tokenizer(pack_of("llama")), "a", GenerateOptions(raw=True, system="b"))


def test_two_streams_read_in_turn_are_both_right(pack_of: PackOf) -> None:
    wanted = GenerateOptions(max_new_tokens=30)
    with Model.open(pack_of("llama"), OpenOptions(device="cpu")) as model:
        right = [model.generate(prompt, wanted).text for prompt in ("hello", "other")]
        streams = [model.stream("hello", wanted), model.stream("other", wanted)]
        texts = ["", ""]
        for pieces in itertools.zip_longest(*streams, fillvalue=""):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == right


def test_threads_may_call_one_model(pack_of: PackOf) -> None:
    wanted = GenerateOptions(max_new_tokens=10)
    prompts = [f"prompt {number}" for number in range(6)]
    with Model.open(pack_of("llama"), OpenOptions(device="cpu")) as model:
        right = [model.generate(prompt, wanted).text for prompt in prompts]
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda prompt: model.generate(prompt, wanted).text, prompts))
    assert found == right


def test_an_error_of_the_callback_ends_the_generation(pack_of: PackOf) -> None:
    def break_down(_: str) -> None:
        raise ZeroDivisionError

    with Model.open(pack_of("llama"), OpenOptions(device="cpu")) as model:
        with pytest.raises(ZeroDivisionError):
            model.generate("hello", GenerateOptions(max_new_tokens=200), on_text=break_down)
        assert model.generate("hello", GenerateOptions(max_new_tokens=3)).text is not None
