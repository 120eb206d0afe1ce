"""Which text is the prompt: byte order marks, last line ends, two places at once, the template."""

from __future__ import annotations

import codecs
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as some

from layerpack.cli.options.prompt import prompt_text, read_prompt, template_arguments

TEXT = "Grüße, 世界"
Ended = subprocess.CompletedProcess[bytes]


def generate(*arguments: str, **how: Any) -> Ended:
    return subprocess.run(
        [sys.executable, "-m", "layerpack.cli.main", "generate", "nowhere", *arguments],
        capture_output=True,
        timeout=60,
        check=False,
        **how,
    )


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),  # what PowerShell's > writes
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_marks_and_the_last_line_end_are_no_text(
    tmp_path: Path, mark: bytes, encoding: str, end: str
) -> None:
    raw = mark + f"{TEXT}{end}".encode(encoding)
    assert prompt_text(raw, "here") == TEXT
    (tmp_path / "prompt.txt").write_bytes(raw)
    assert read_prompt(None, str(tmp_path / "prompt.txt")) == TEXT


@given(text=some.text(alphabet=some.characters(codec="utf-8")))
def test_nothing_else_of_a_text_changes(text: str) -> None:
    for whole, left in ((text + "\n", text.removesuffix("\r")), (f"{text}\n\n", f"{text}\n")):
        if not whole.startswith("\ufeff"):
            assert prompt_text(whole.encode(), "here") == left


@pytest.mark.parametrize("raw", [b"a\xff", codecs.BOM_UTF16_LE + b"a", codecs.BOM_UTF8 + b"\x80"])
def test_text_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(click.UsageError, match=r"^here: not UTF-.* text \(byte \d+"):
        prompt_text(raw, "here")


@pytest.mark.parametrize("option", ["--prompt", "--prompt-file"])
def test_a_second_text_is_refused_not_dropped(tmp_path: Path, option: str) -> None:
    (tmp_path / "text").write_bytes(b"also this")
    value = "this" if option == "--prompt" else str(tmp_path / "text")
    piped = generate(option, value, input=b"also this")
    with open(tmp_path / "text", "rb") as file:
        redirected = generate(option, value, stdin=file)
    for ended in (piped, redirected):
        assert ended.returncode == 2, ended.stderr
        assert f"{option} is given, and standard input holds text, too".encode() in ended.stderr


def test_what_holds_no_text_is_no_second_one(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    reading, writing = os.pipe()
    with open(tmp_path / "empty", "rb") as file, open(reading, "rb"), open(writing, "wb"):
        for how in ({"input": b""}, {"stdin": subprocess.DEVNULL}, {"stdin": file}):
            assert b"nowhere: no such directory" in generate("--prompt", "a", **how).stderr
        # A pipe that stays open must not stop the run.
        assert b"nowhere: no such directory" in generate("--prompt", "a", stdin=reading).stderr


def test_standard_input_by_its_usual_name() -> None:
    ended = generate("--prompt-file", "-", input=b"")
    assert b"the prompt is empty" in ended.stderr


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("thinking=false", False),
        ("thinking=False", False),
        ("thinking=TRUE", True),
        ("thinking=None", None),
        ("thinking=3", 3),
        ("thinking=high", "high"),
        ("thinking=", ""),
        ("thinking=a=b", "a=b"),
        ('thinking={"depth": [1, 2]}', {"depth": [1, 2]}),
    ],
)
def test_template_arguments(pair: str, value: Any) -> None:
    parse: Callable[..., Any] = template_arguments
    assert parse(None, None, (pair,)) == {"thinking": value}
    assert parse(None, None, ()) is None


@pytest.mark.parametrize("pair", ["thinking", "=x", "two words=1", ""])
def test_template_arguments_that_are_none(pair: str) -> None:
    parse: Callable[..., Any] = template_arguments
    with pytest.raises(click.BadParameter, match="NAME=VALUE"):
        parse(None, None, (pair,))
