"""Ctrl-C and SIGTERM in any stage: a short end, and the same command goes on from there."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.packs.comparing import differing
from support.runs.interrupting import STAGES, run_interrupted

from layerpack.convert import convert

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals"),
]


@pytest.fixture(scope="module")
def forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["interrupting", "transformers.models.llama.modeling_llama"])
    return context


@pytest.fixture(scope="module")
def source_and_pack(
    checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A checkpoint and what an undisturbed conversion makes of it."""
    source = checkpoint_of("llama", num_hidden_layers=6)
    pack = tmp_path_factory.mktemp("undisturbed") / "pack"
    convert(str(source), pack)
    return source, pack


def check_goes_on(
    forkserver: Any, source_and_pack: tuple[Path, Path], tmp_path: Path, stage: str, number: int
) -> tuple[int, str]:
    """Exit code and standard error of a conversion signalled in `stage`, and then finished."""
    source, pack = source_and_pack
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = ["convert", str(source), str(out), "--device", "cpu"]
    child = forkserver.Process(target=run_interrupted, args=(stage, number, arguments, log))
    child.start()
    child.join()
    assert not out.exists()
    convert(str(source), out)
    assert not differing(pack, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]
    return child.exitcode, log.read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c(
    stage: str, forkserver: Any, source_and_pack: tuple[Path, Path], tmp_path: Path
) -> None:
    code, text = check_goes_on(forkserver, source_and_pack, tmp_path, stage, signal.SIGINT)
    assert code == 130, text
    assert text.splitlines()[-1] == "layerpack: interrupted"
    assert "Traceback" not in text


@pytest.mark.parametrize("stage", ["digest", "write", "journal", "commit"])
def test_sigterm(
    stage: str, forkserver: Any, source_and_pack: tuple[Path, Path], tmp_path: Path
) -> None:
    code, text = check_goes_on(forkserver, source_and_pack, tmp_path, stage, signal.SIGTERM)
    assert code == -signal.SIGTERM
    assert "Traceback" not in text
