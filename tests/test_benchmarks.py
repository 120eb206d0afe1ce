"""The benchmark programs that run anywhere do run, and count their bytes right."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layerpack.convert.api import plan_source
from layerpack.convert.options import ConvertOptions
from layerpack.convert.source.directory import DirectorySource
from layerpack.formats.pack import Pack
from layerpack.runtime.core.slices import pass_slices

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_disk_alone_reads_a_whole_pass(pack_of: Callable[..., Path]) -> None:
    pack = pack_of("llama")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "disk_alone.py", pack, "--seconds", "0.01"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["pass_bytes"] == sum(part.length_bytes for part in pass_slices(Pack.open(pack)))
    assert report["pass_gb_s"] > 0
    assert len(report["probes"]) == 6
    speeds = [probe["gb_s"] for probe in report["probes"]]
    assert speeds == sorted(speeds, reverse=True)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their folder is where Python looks, as when one is started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.usefixtures("programs")
def test_reading_alone_is_the_converters(checkpoint_of: Callable[..., Path]) -> None:
    program = importlib.import_module("convert_gpu")
    with DirectorySource(checkpoint_of("llama")) as opened:
        plan = plan_source(opened, ConvertOptions())
        for file in opened.files:
            opened.fetch(file.name, lambda _: None)
        program.read_alone(plan, opened, torch.device("cpu"))


@pytest.mark.usefixtures("programs")
def test_layerpack_alone_is_enough_to_generate(
    pack_of: Callable[..., Path], tmp_path: Path
) -> None:
    found = importlib.import_module("parts.own_environment").link_own(tmp_path)
    assert "layerpack" in found and "pytest" not in found
    command = [sys.executable, "-S", "-m", "layerpack.cli.main", "generate", str(pack_of("llama"))]
    done = subprocess.run(
        [*command, "--prompt", "a", "--max-new-tokens", "2"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
