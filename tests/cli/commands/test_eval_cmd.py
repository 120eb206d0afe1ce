"""`layerpack eval` as a user runs it: figures, references, files, and what is refused."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerpack.cli.runs.scratch import scratch_beside
from layerpack.convert.api import convert
from layerpack.convert.options import ConvertOptions
from layerpack.runtime.model import Model

PackOf = Callable[..., Path]
FEW = ("--device", "cpu", "--window", 32, "--windows", 6)


def test_a_table_of_perplexity(pack_of: PackOf, run: Any, tmp_path: Path) -> None:
    done = run("eval", pack_of("llama"), *FEW)
    assert done.code == 0 and done.err == ""
    first, second = done.out.splitlines()
    assert "6 windows of 32 tokens, 90 scored" in first
    assert second.startswith("perplexity ") and "±" in second


@pytest.mark.parametrize("kind", ["checkpoint", "pack"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_reference(
    checkpoint_of: PackOf, pack_of: PackOf, run: Any, tmp_path: Path, kind: str, keep: bool
) -> None:
    """A checkpoint is run in 16 bits, so what a 16-bit pack of it gives is the same."""
    pack = tmp_path / "packs" / "nf4"
    pack.parent.mkdir()
    pack.symlink_to(pack_of("llama"))
    source = checkpoint_of("llama") if kind == "checkpoint" else pack_of("llama", nf4=False)
    how = [*FEW, "--reference", source, "--json"]
    if keep:
        how += ["--logits", tmp_path / "logits"]
    done = run("eval", pack, *how)
    assert done.code == 0 and "logits of " in done.err
    found = json.loads(done.out)
    assert found["reference"] == str(source) and found["scored_tokens"] == 90
    assert 0 < found["kl_median"]["value"] < found["kl_99th_percentile"]["value"] < 2
    assert 0 < found["same_first_choice"]["value"] <= 1
    assert found["kl_mean"]["standard_error"] > 0
    assert found["perplexity"]["value"] != found["reference_perplexity"]["value"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == (["logits", "packs"] if keep else ["packs"])
    assert [path.name for path in pack.parent.iterdir()] == ["nf4"]
    if keep:
        again = run("eval", pack, *FEW, "--logits", tmp_path / "logits", "--json")
        assert again.err == ""
        same = json.loads(again.out)
        assert {k: v for k, v in same.items() if k != "seconds"} == {
            k: v for k, v in found.items() if k != "seconds"
        }
        other = run("eval", pack, *FEW, "--logits", tmp_path / "logits", "--reference", pack)
        assert other.code == 1 and f"holds the logits of {source}" in other.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "{tmp}/none"], "none: cannot be read (No such file"),
        (
            ["--text", "{tmp}/latin"],
            "latin: not UTF-8 text (byte 2 is the first wrong one); save it as UTF-8",
        ),
        (["--text", "{tmp}/short"], "short: 5 tokens, not one window of 32; give a longer text"),
        (["--window", "300"], "windows of 300 tokens: the model of"),
        (["--logits", "{tmp}/none"], "none: not there; name whose logits to put there"),
        (["--logits", "{tmp}/short"], "short: cannot be read"),
        (["--reference", "{tmp}/short"], "short"),
        (["--logits", "{tmp}/no/where", "--reference", "{pack}"], "no/where: cannot be written"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    pack_of: PackOf, run: Any, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "latin").write_bytes("für immer".encode("latin-1"))
    (tmp_path / "short").write_text("short")
    pack = pack_of("llama")
    done = run("eval", pack, *FEW, *[text.format(tmp=tmp_path, pack=pack) for text in arguments])
    last = done.err.splitlines()[-1]
    assert done.code == 1 and last.startswith("layerpack: error: ") and words in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin", "short"]
    assert not list(pack.parent.glob("layerpack-eval-*"))


def test_weights_of_another_source_are_not_taken_for_this_ones(
    checkpoint_of: PackOf, pack_of: PackOf, run: Any, tmp_path: Path
) -> None:
    """A break left the 16 bits of another model under the name."""
    one, other = checkpoint_of("llama"), checkpoint_of("llama", num_hidden_layers=2)
    file, left = tmp_path / "logits", tmp_path / "logits.16bit"
    for source, nf4 in ((other, False), (one, True)):
        convert(str(source), left, ConvertOptions(nf4=nf4))
        done = run("eval", pack_of("llama"), *FEW, "--reference", one, "--logits", file, "--json")
        assert done.code == 0 and "its weights in 16 bits, for as long as this runs" in done.err
        same = run("eval", pack_of("llama"), *FEW, "--reference", one, "--json")
        fields = ("kl_mean", "reference_perplexity")
        found, wanted = json.loads(done.out), json.loads(same.out)
        assert [found[key] for key in fields] == [wanted[key] for key in fields]
        assert not left.exists()
        file.unlink()


def test_ctrl_c_gives_what_there_is(
    pack_of: PackOf, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = Model.logits, iter([False, True])

    def interrupted(*arguments: Any) -> Any:
        if next(calls):
            raise KeyboardInterrupt
        return usual(*arguments)

    monkeypatch.setattr(Model, "logits", interrupted)
    monkeypatch.setattr("layerpack.runtime.quality.evaluate.PREFILL_TOKENS", 64)
    done = run("eval", pack_of("llama"), *FEW)
    assert done.code == 130
    assert "2 windows of 32 tokens, 30 scored" in done.out and "perplexity" in done.out
    assert done.err == "interrupted: the figures are of the windows so far\n"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_break_while_the_reference_runs_goes_on(
    checkpoint_of: PackOf, pack_of: PackOf, run: Any, tmp_path: Path, sent: signal.Signals
) -> None:
    """Nothing stands under the final name; the same command goes on, with the same file."""
    file = tmp_path / "logits"
    how = ["eval", pack_of("llama"), "--reference", checkpoint_of("llama"), "--logits"]
    command = [*how, file, "--device", "cpu", "--window", 256]
    slowly = (
        "import time, layerpack.runtime.quality.logits_file as f; usual = f.LogitsWriter.append\n"
        "def append(*a): usual(*a); a[0]._file.flush(); print(a[0].num_done, flush=True);"
        " time.sleep(0.3)\n"
        "f.LogitsWriter.append = append\n"
        "from layerpack.cli.main import main; import sys; main(sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", slowly, *map(str, command)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(sent)
        process.wait(30)
    assert not file.exists() and (tmp_path / "logits.partial").exists()
    begin = (tmp_path / "logits.partial").stat().st_size
    assert begin > 100_000
    done = run(*command)
    assert done.code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["logits"]
    whole = tmp_path / "whole"
    run(*how, whole, "--device", "cpu", "--window", 256)
    assert file.read_bytes() == whole.read_bytes()


def test_what_a_killed_run_left_beside_the_pack_goes(
    checkpoint_of: PackOf, pack_of: PackOf, run: Any, tmp_path: Path
) -> None:
    """What another run is at work in stays."""
    pack = tmp_path / "pack"
    pack.symlink_to(pack_of("llama"))
    with contextlib.ExitStack() as others:
        others.enter_context(scratch_beside(pack))
        left = tmp_path / "layerpack-eval-left"
        left.mkdir()
        for name in ("lock", "logits.partial"):
            (left / name).write_bytes(b"")
        done = run("eval", pack, *FEW, "--reference", checkpoint_of("llama"))
        assert done.code == 0
        assert len(list(tmp_path.iterdir())) == 2 and not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_a_reference_of_another_model_is_told_before_it_runs(
    checkpoint_of: PackOf, pack_of: PackOf, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "logits", lambda *_: pytest.fail("run"))
    other = checkpoint_of("llama-odd")
    done = run("eval", pack_of("llama"), *FEW, "--reference", other)
    assert done.code == 1 and "the reference's vocabulary has 301 tokens" in done.err
