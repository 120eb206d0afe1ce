"""The benchmark programs that run anywhere do run, and count their bytes right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
