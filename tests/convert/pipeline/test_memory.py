"""Memory of a conversion: bounded by a few tensors, whatever the size of the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource", reason="peak memory is asked of a POSIX system")

MEASURE = """
import resource, sys
from layerpack.convert.api import convert
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2])
before = peak()
convert(sys.argv[3], sys.argv[4])
print(peak() - before)
"""


def test_peak_does_not_grow_with_the_model(make_checkpoint: Any, tmp_path: Path) -> None:
    small = make_checkpoint("llama", name="small")
    large = make_checkpoint(
        "llama",
        name="large",
        vocab_size=100_000,
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=12,
        tie_word_embeddings=False,
        max_shard_size="120MB",
    )
    weights_bytes = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    paths = [small, tmp_path / "a", large, tmp_path / "b"]
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)],
        check=True,
        capture_output=True,
        text=True,
    )
    grown_bytes = int(child.stdout) * 1024
    assert weights_bytes > 350_000_000
    # The largest weight to quantise takes 4 MB, the embedding 102 MB.
    assert grown_bytes < 102_000_000
