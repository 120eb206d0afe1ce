"""`layerpack calibrate` and `convert --calibration` as a user runs them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerpack.runtime.quality.windows import read_text

PathOf = Callable[..., Path]
FEW = ("--device", "cpu", "--window", 64)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text"
    file.write_text(read_text(None)[:5000])
    return file


def test_from_a_text_to_a_better_pack(
    checkpoint_of: PathOf, pack_of: PathOf, run: Any, tmp_path: Path, text: Path
) -> None:
    pack, source = pack_of("llama"), checkpoint_of("llama")
    done = run("calibrate", pack, tmp_path / "cal", "--text", text, *FEW)
    assert done.code == 0 and done.err.startswith(
        "4992 tokens go through LlamaForCausalLM once; at most "
    )
    assert "note: 4992 tokens are few; what the text does not show may come out worse" in done.err
    assert "cal: 3 layers, 4992 tokens, " in done.out
    made = run("convert", source, tmp_path / "out", "--calibration", tmp_path / "cal")
    assert made.code == 0
    assert "note: 18 weights are calibrated with 4992 tokens; 3 get the nearest codes" in made.err
    assert "note: choosing codes takes about 0 s\n" in made.err
    shown = run("inspect", tmp_path / "out")
    assert "calibration   codes of 18 weights, by 4992 tokens (xxh3_128:" in shown.out
    few = ("--device", "cpu", "--window", 64, "--windows", 30, "--json", "--reference", source)
    before, after = (run("eval", path, *few) for path in (pack, tmp_path / "out"))
    kl = [json.loads(done.out)["kl_mean"]["value"] for done in (before, after)]
    assert kl[1] < 0.9 * kl[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{pack}", "{tmp}/cal"], "Missing option '--text'"),
        (["{pack}", "{tmp}/cal", "--text", "{tmp}/none"], "none: cannot be read (No such file"),
        (["{pack}", "{tmp}/cal", "--text", "{tmp}/few"], "too few to calibrate with, give 1024"),
        (["{pack}", "{tmp}", "--text", "{tmp}/text"], "is there already"),
        (["{pack}", "{tmp}/no/where", "--text", "{tmp}/text"], "where: cannot be written (No"),
        (["{pack}", "{tmp}/cal", "--text", "{tmp}/text", "--window", "300"], "takes 256; give"),
        (["{tmp}", "{tmp}/cal", "--text", "{tmp}/text"], "layerpack.json"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    pack_of: PathOf, run: Any, tmp_path: Path, text: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "few").write_text("word " * 120)
    given = [text.format(tmp=tmp_path, pack=pack_of("llama")) for text in arguments]
    done = run("calibrate", *FEW, *given)
    last = done.err.splitlines()[-1]
    assert done.code in (1, 2) and words in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "text"]


def test_16_bits_have_no_codes(checkpoint_of: PathOf, run: Any, tmp_path: Path) -> None:
    done = run(
        "convert", checkpoint_of("llama"), tmp_path / "out", "--bits", 16, "--calibration", tmp_path
    )
    assert done.code == 2 and "--bits 16 quantises nothing" in done.err


def test_without_numba_a_line_says_what_to_install(
    checkpoint_of: PathOf,
    pack_of: PathOf,
    run: Any,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run("calibrate", pack_of("llama"), tmp_path / "cal", "--text", text, *FEW)
    monkeypatch.setitem(sys.modules, "numba", None)
    done = run(
        "convert", checkpoint_of("llama"), tmp_path / "out", "--calibration", tmp_path / "cal",
        "--device", "cpu",
    )  # fmt: skip
    assert done.code == 1 and "pip install 'layerpack[calibration]'" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_break_goes_on(
    pack_of: PathOf, run: Any, tmp_path: Path, text: Path, sent: signal.Signals
) -> None:
    command = ["calibrate", pack_of("llama"), tmp_path / "cal", "--text", text, *FEW]
    slowly = (
        "import time, layerpack.runtime.quality.calibrate as c; usual = c.Unfinished.put\n"
        "def put(*a): usual(*a); print(a[1], flush=True); time.sleep(0.5)\n"
        "c.Unfinished.put = put\n"
        "from layerpack.cli.main import main; import sys; main(sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", slowly, *map(str, command)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.send_signal(sent)
        process.wait(30)
        said = process.stderr.read().decode()
    assert not (tmp_path / "cal").exists()
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert said.endswith("interrupted; the same command goes on from here\n")
    assert run(*command).code == 0
    whole = ["calibrate", pack_of("llama"), tmp_path / "whole", *command[3:]]
    assert run(*whole).code == 0
    found, wanted = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("cal", "whole")
    )
    assert found == wanted
