"""A text's windows, and texts that have none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerpack.formats.errors import PromptError
from layerpack.runtime.quality.windows import read_text, windows_of
from layerpack.runtime.tokenizer import load_tokenizer


class Letters:
    """A tokenizer of a token a character, with a first token or without."""

    def __init__(self, first: int | None = None, bos: int | None = None) -> None:
        self.first, self.bos_token_id = first, bos

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        begin = [self.first] if self.first is not None and add_special_tokens else []
        return type("", (), {"input_ids": begin + [ord(one) % 50 + 10 for one in text]})


@given(st.text(max_size=300), st.integers(4, 40), st.one_of(st.none(), st.integers(1, 5)))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_windows_are_the_text(text: str, num_tokens: int, most: int | None) -> None:
    ids = [ord(one) % 50 + 10 for one in text]
    count = min(len(ids) // num_tokens, most or len(ids))
    if not count:
        with pytest.raises(PromptError, match="not one window"):
            windows_of(text, Letters(), num_tokens=num_tokens, most=most, where="x")
        return
    found = windows_of(text, Letters(), num_tokens=num_tokens, most=most, where="x")
    assert found.ids.flatten().tolist() == ids[: count * num_tokens]
    assert found.num_scored == len(found.scored[0]) == num_tokens - num_tokens // 2 - 1
    assert found.scored[0].tolist() == ids[num_tokens // 2 + 1 : num_tokens]


def test_each_window_begins_as_a_text_does() -> None:
    plain = windows_of("a" * 40, Letters(first=1, bos=2), num_tokens=10, where="")
    assert plain.ids.unique().tolist() == [ord("a") % 50 + 10]  # its first token is no BOS
    begun = windows_of("a" * 40, Letters(first=1, bos=1), num_tokens=10, where="")
    assert begun.ids.shape == (4, 10) and begun.ids[:, 0].tolist() == [1] * 4
    assert (begun.ids[:, 1:] != 1).all()


def test_the_shipped_text_is_64_kb_of_ascii(pack_of: Callable[..., Path]) -> None:
    text = read_text(None)
    assert text.isascii() and 64_000 < len(text) <= 65_536
    found = windows_of(text, load_tokenizer(pack_of("llama")), num_tokens=512, where="")
    assert len(found) > 10


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\xff\xfea", "not UTF-16 text (byte 3 is the first wrong one); save it as UTF-8"),
        ("für".encode("latin-1"), "not UTF-8 text (byte 2 is the first wrong one)"),
        (None, "cannot be read (No such file"),
    ],
)
def test_a_text_that_cannot_be_read(tmp_path: Path, raw: bytes | None, words: str) -> None:
    path = tmp_path / "text"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(PromptError) as refused:
        read_text(path)
    assert str(refused.value).startswith(str(path)) and words in str(refused.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):  # as Windows' programs save texts
        (tmp_path / "text").write_bytes("hello".encode(encoding))
        assert read_text(tmp_path / "text") == "hello"
