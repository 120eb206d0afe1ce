"""Where a prompt comes from: an option, a file or standard input; and what its template is told."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from pathlib import Path
from typing import Any

import click

from layerpack.formats.errors import PromptError
from layerpack.formats.text import decode_text, require_utf8, without_path

_FIRST_BYTE_S = 1.0
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None, "null": None}


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt's text, from the one place that has it. Raises click.UsageError."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("give --prompt or --prompt-file, not both")
    refuse_second_prompt(prompt, prompt_file, wait_s=_FIRST_BYTE_S)
    if prompt is not None:
        return as_utf8(prompt, "--prompt")
    if prompt_file not in (None, "-"):
        try:
            raw = Path(prompt_file).read_bytes()
        except OSError as reason:
            why = without_path(reason, Path(prompt_file))
            raise click.UsageError(f"--prompt-file {prompt_file}: cannot be read ({why})") from None
        return prompt_text(raw, f"--prompt-file {prompt_file}")
    if sys.stdin is None or sys.stdin.isatty():  # None: it was closed when Python started
        raise click.UsageError("no prompt; give --prompt TEXT, --prompt-file FILE, or pipe one in")
    return prompt_text(sys.stdin.buffer.read(), "standard input")


def refuse_second_prompt(prompt: str | None, prompt_file: str | None, wait_s: float = 0.0) -> None:
    """Raises click.UsageError if text was piped in beside the one or the other.

    A pipe that is open but empty is waited for, so long: programs often leave one to what they
    start, and never close it.
    """
    if (prompt is not None or prompt_file not in (None, "-")) and _is_piped(wait_s):
        given = "--prompt" if prompt is not None else "--prompt-file"
        raise click.UsageError(
            f"{given} is given, and standard input holds text, too; put all of the prompt into one "
            "of them (what to do with a text can be the --system message), or add </dev/null"
        )


def prompt_text(raw: bytes, where: str) -> str:
    """The text that a file or a pipe holds, without its last line end. Raises click.UsageError."""
    try:
        text = decode_text(raw, where)
    except PromptError as reason:
        raise click.UsageError(str(reason)) from None
    # What `echo` and editors put behind a text is not part of it; more than one was meant.
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def as_utf8(text: str, where: str) -> str:
    """`text` itself. Raises click.UsageError if it came as other bytes than UTF-8."""
    try:
        require_utf8(text, where)
    except PromptError as reason:
        raise click.UsageError(str(reason)) from None
    return text


def template_arguments(
    _context: click.Context, _option: click.Parameter, given: tuple[str, ...]
) -> dict[str, Any] | None:
    """`name=value` pairs as the template gets them: values are JSON, or else text."""
    arguments: dict[str, Any] = {}
    for pair in given:
        name, sign, value = pair.partition("=")
        if not sign or not name.isidentifier():
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE, as in enable_thinking=false")
        as_utf8(value, f"--template-arg {name}")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            # As Python spells them, they would be text, and any text counts as true.
            arguments[name] = _WORDS.get(value.lower(), value)
    return arguments or None


def _is_piped(wait_s: float) -> bool:
    """Whether there is text on standard input: in a file that it was taken from, or in a pipe."""
    if sys.stdin is None or os.name != "posix":
        return False
    try:
        descriptor = sys.stdin.fileno()
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            return os.lseek(descriptor, 0, os.SEEK_CUR) < status.st_size
        if not stat.S_ISFIFO(status.st_mode):
            return False
        ready, _, _ = select.select([descriptor], [], [], wait_s)
        return bool(ready) and os.read(descriptor, 1) != b""
    except (OSError, ValueError):
        return False


template_option = click.option(
    "--template-arg",
    "template_arguments",
    multiple=True,
    metavar="NAME=VALUE",
    callback=template_arguments,
    help="Tell the chat template something, as in enable_thinking=false; may be repeated.",
)
