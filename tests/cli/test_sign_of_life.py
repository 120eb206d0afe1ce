"""On a terminal something is said within a second; elsewhere nothing, and no text is disturbed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pty = pytest.importorskip("pty")
COMMAND = [sys.executable, "-m", "layerpack.cli.main"]


def on_a_terminal(arguments: list[str]) -> tuple[str, str, float]:
    """Standard output, what the terminal of standard error got, and seconds to its first sign."""
    ours, theirs = pty.openpty()
    begin_s = time.monotonic()
    with subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        said = os.read(ours, 1)
        first_s = time.monotonic() - begin_s
        try:
            while more := os.read(ours, 1000):
                said += more
        except OSError:  # Linux' way to say that it is closed
            pass
        assert process.stdout is not None
        out = process.stdout.read().decode()
    os.close(ours)
    assert process.returncode == 0, said
    return out, said.decode(), first_s


def test_generate(pack_of: Callable[..., Path]) -> None:
    arguments = ["generate", str(pack_of("llama")), "--prompt", "a", "--max-new-tokens", "4"]
    arguments += ["--device", "cpu"]
    out, said, _ = on_a_terminal(arguments)
    assert re.match(r"\r\x1b\[Kimporting …\r\x1b\[Kopening .* …\r\x1b\[K", said), said
    assert re.search(r"the first pass of 0 B …\r\x1b\[K\[4 tokens in [^\x1b]*$", said), said
    plain = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=True)
    assert plain.stdout == out and "…" not in plain.stderr


def test_convert(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["convert", str(checkpoint_of("llama")), str(tmp_path / "pack")]
    _, said, _ = on_a_terminal(arguments)
    assert said.startswith(f"\r\x1b[Klooking at {arguments[1]}"[:60])
    assert "\r\x1b[KLlamaForCausalLM, " in said
