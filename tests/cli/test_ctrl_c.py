"""Ctrl-C during `layerpack generate`: what was said stays, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerpack.cli.runs import generate as generate_run
from layerpack.convert.api import convert

Run = Callable[..., Any]
CheckpointOf = Callable[..., Path]
PROMPT = "hello there"


def test_ctrl_c_in_the_middle_keeps_what_there_is(
    generate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        print_piece(piece)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    print_piece = generate_run._print_piece
    monkeypatch.setattr(generate_run, "_print_piece", interrupt)
    done = generate("--prompt", PROMPT, "--max-new-tokens", 100)
    assert done.code == 130
    assert done.out == "".join(pieces) + "\n"
    assert done.err.endswith("; interrupted]\n") and "Traceback" not in done.err


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at a process in /proc")
@pytest.mark.parametrize("when", ["loading", "generating"])
def test_ctrl_c_from_a_terminal(checkpoint_of: CheckpointOf, tmp_path: Path, when: str) -> None:
    endless = checkpoint_of("llama", max_position_embeddings=1 << 20, eos_token_id=None)
    convert(str(endless), tmp_path / "pack")
    command = [sys.executable, "-m", "layerpack.cli.main", "generate", str(tmp_path / "pack")]
    command += ["--prompt", PROMPT, "--device", "cpu", "--max-new-tokens", "500000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        if when == "loading":
            while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
                time.sleep(0.02)
        else:
            process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert (b"layerpack: interrupted" if when == "loading" else b"; interrupted]") in err
