"""What `layerpack convert` shows: what it will take, how far it is, one line at the end."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from layerpack.cli import progress
from layerpack.cli.main import main


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_before_and_one_after(
    checkpoint_of: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(checkpoint_of("llama")), str(tmp_path / "out")])
    said = capfd.readouterr()
    assert not ended.value.code
    before = r"LlamaForCausalLM, 3 layers: [\d.]+ kB of pack to write, [\d.]+ GB free\n"
    assert re.fullmatch(before, said.err)
    after = r".*out: LlamaForCausalLM, 3 layers, [\d.]+ kB from [\d.]+ kB in \d+ s\n"
    assert re.fullmatch(after, said.out)


def test_a_log_file_gets_a_line_twice_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 0.0
    monkeypatch.setattr("layerpack.cli.progress.time.monotonic", lambda: now_s)
    with progress.byte_bar("convert") as update:
        for step in range(0, 101):
            now_s = step * 6.0
            update((100 + step) * 10**9, 300 * 10**9)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    # 5 GB in half a minute; the 100 GB of an earlier run took none of it.
    assert lines[0] == "convert: 35 %, 105.0 GB of 300.0 GB, 20 min left"
    assert lines[-1] == "convert: 66 %, 200.0 GB of 300.0 GB, 10 min left"


def test_a_terminal_gets_a_bar_that_goes_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress.byte_bar("convert") as update:
        assert not terminal.getvalue()
        for done_bytes in range(0, 1001, 100):
            update(done_bytes, 1000)
    text = terminal.getvalue()
    assert "convert:" in text and "/1.00k" in text
    assert text.rsplit("\r", 2)[1].strip() == ""


@pytest.mark.parametrize("target", ["/", "/usr/.."])
def test_the_root_directory_is_no_target(
    target: str, checkpoint_of: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(checkpoint_of("llama")), target])
    refusal = "layerpack: error: /: the root directory; name a target inside it\n"
    assert (ended.value.code, capfd.readouterr().err) == (1, refusal)


@pytest.mark.parametrize(
    "other", [["--block-size", "32"], ["--no-double-quant"], ["--head", "nf4"]]
)
def test_sixteen_bits_take_no_options_of_nf4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(tmp_path), str(tmp_path / "out"), "--bits", "16", *other])
    assert ended.value.code == 2
    assert "--bits 16 quantises nothing" in capsys.readouterr().err
