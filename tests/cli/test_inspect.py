"""`layerpack inspect` on a pack: its figures, its JSON, and how little it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.packs.unfinished import run_until
from support.runs.imports import HEAVY, imported_by

from layerpack.cli.main import layerpack, main
from layerpack.cli.reports.lines import columns, human_count, human_seconds
from layerpack.formats.pack import Pack
from layerpack.formats.summary import fold_layers, pass_bytes, summarise_blobs

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: what a command line that ends well prints."""

    def get(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        output = capsys.readouterr()
        assert not ended.value.code, output.err
        return output.out

    return get


def test_the_table_and_the_sum_of_a_pack(pack_of: Callable[..., Path], run: Run) -> None:
    path = pack_of("qwen2")
    manifest = Pack.open(path).manifest
    text = run("inspect", path)
    assert "Qwen2ForCausalLM, 3 layers" in text and "double quantisation" in text
    assert f"source        directory {manifest.source.id}, 1 file of " in text
    (layers,) = (line for line in text.splitlines() if line.startswith("layers 0-2"))
    assert "3 x " in layers and "7 NF4, 5 BF16" in layers
    assert len([line for line in text.splitlines() if "safetensors" in line]) == 3
    every = run("inspect", path, "--blobs")
    assert all(f"\nlayer {index} " in every for index in range(3))
    assert every.count(".safetensors") == 5


def test_json_adds_up(pack_of: Callable[..., Path], run: Run) -> None:
    path = pack_of("qwen2")
    shown = json.loads(run("inspect", path, "--json", "--tensors", "--link", 0.5, "--disk", 2))
    blobs = shown["blobs"]
    assert shown["kind"] == "pack" and shown["total_bytes"] == sum(b["size_bytes"] for b in blobs)
    assert shown["total_bytes"] == sum(f.stat().st_size for f in path.glob("*.safetensors"))
    assert sum(b["num_parameters"] for b in blobs) == shown["model"]["num_parameters"]
    moved = shown["pass"]
    layers = [t for b in blobs[1:-1] for t in b["tensors"]]
    assert moved["layer_bytes"] == sum(t["length_bytes"] for t in layers)
    (head,) = (t for t in blobs[-1]["tensors"] if t["name"] == "lm_head.weight")
    assert moved["head_bytes"] == head["length_bytes"] == 300 * 96 * 2
    assert moved["from_host_s"] == moved["total_bytes"] / 0.5e9
    assert moved["from_disk_s"] == moved["from_host_s"]  # the link is the slower one
    assert sum(t["stored_as"] == "NF4" for t in layers) == 21
    assert all(t["weight_shape"] for t in layers if t["stored_as"] == "NF4")
    assert "tensors" not in json.loads(run("inspect", path, "--json"))["blobs"][0]


def test_a_tied_head_streams_the_embedding(pack_of: Callable[..., Path], run: Run) -> None:
    path = pack_of("llama-tied")
    manifest = Pack.open(path).manifest
    assert pass_bytes(manifest).head_bytes == manifest.embedding.tensors[0].length_bytes
    assert "lm_head (the embedding's weight) 38.4 kB" in run("inspect", path)


def test_a_pack_of_16_bits_is_told(pack_of: Callable[..., Path], run: Run) -> None:
    path = pack_of("llama", nf4=False)
    assert "quantisation  none; all of it in BF16, lm_head: BF16" in run("inspect", path)
    assert json.loads(run("inspect", path, "--json"))["quantization"] is None
    assert "BF16" in run("inspect", path, "--stats")


def test_an_nf4_head_is_told(pack_of: Callable[..., Path], run: Run) -> None:
    text = run("inspect", pack_of("llama", nf4_head=True, double_quant=False))
    assert "scales in float32" in text and "lm_head: NF4" in text
    assert "1 NF4, 1 BF16" in text


def test_every_tensor_has_a_line(pack_of: Callable[..., Path], run: Run) -> None:
    path = pack_of("qwen2")
    lines = run("inspect", path, "--tensors").splitlines()
    for blob in Pack.open(path).manifest.blobs:
        for entry in blob.tensors:
            (line,) = (line for line in lines if line.split(" ", 1)[0] == entry.name)
            assert f" {entry.offset_bytes} " in line and blob.file in line


def test_only_layers_that_are_alike_are_folded(pack_of: Callable[..., Path]) -> None:
    blobs = list(Pack.open(pack_of("llama-tied")).manifest.blobs)
    rows = list(summarise_blobs(blobs))
    assert [row.layers for row in fold_layers(rows)] == [None, (0, 3), None]
    assert [row.count for row in fold_layers(rows)] == [1, 4, 1]
    other = summarise_blobs([blobs[0]])[0]
    odd = [*rows[:2], type(other)(**{**_fields(rows[2]), "num_parameters": 1}), *rows[3:]]
    assert [row.layers for row in fold_layers(odd)] == [None, (0, 0), (1, 1), (2, 3), None]


def _fields(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}


def test_what_is_here_has_no_revision(
    checkpoint_of: Callable[..., Path], pack_of: Callable[..., Path], tmp_path: Path
) -> None:
    run_until(checkpoint_of("llama"), tmp_path / "out", 0.5)
    for target in (pack_of("llama"), tmp_path / "out"):
        result = CliRunner().invoke(layerpack, ["inspect", str(target), "--revision", "v1"])
        assert result.exit_code == 2
        assert result.output.endswith(
            f"Error: --revision is for a source on the Hub, and {target} is on this machine; "
            "leave it out\n"
        )


def test_inspect_imports_nothing_heavy(pack_of: Callable[..., Path]) -> None:
    modules, _ = imported_by("inspect", str(pack_of("qwen2")), "--tensors")
    assert not HEAVY & modules


def test_a_reader_that_has_seen_enough_ends_it_quietly(pack_of: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "layerpack.cli.main", "inspect", str(pack_of("qwen2"))]
    with subprocess.Popen(
        [*command, "--tensors"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert list(columns([["a\x1b[2J", "b"], ["c", "d\n"]])) == ["a\\x1b[2J  b", "c         d\\n"]


def test_figures_for_people() -> None:
    assert [human_count(n) for n in (7, 28_800, 877_700_000, 72_700_000_000)] == [
        "7",
        "28.8 k",
        "877.7 M",
        "72.7 B",
    ]
    assert [human_seconds(s) for s in (0.0203, 3.2251, 119, 2900, 11_520)] == [
        "20.3 ms",
        "3.23 s",
        "119 s",
        "48.3 min",
        "3.2 h",
    ]
