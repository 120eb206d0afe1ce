"""`layerpack plan`: what it prints, and what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from support.runs.imports import imported_by

from layerpack.cli.main import layerpack
from layerpack.formats.errors import CapacityError

PackOf = Callable[..., Path]
LAPTOP = ["--assume-vram", "7500MB", "--assume-link", "13", "--assume-disk", "6"]
LAPTOP += ["--assume-ram", "16GB"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(layerpack, ["plan", *map(str, arguments)], catch_exceptions=False)


def facts(*arguments: object) -> dict[str, object]:
    parsed: dict[str, object] = json.loads(run(*arguments, "--json").output)
    return parsed


def test_a_plan_for_an_assumed_machine_touches_neither_gpu_nor_disk(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("layerpack.runtime.planning.probe_machine", refuse)
    result = run(pack_of("llama"), *LAPTOP, "--vram-layers", 2, "--host-layers", 1, "--layers")
    assert result.exit_code == 0
    for line in (
        "VRAM         7.5 GB may be used",
        "  VRAM           2    79.6 kB   layer 1; lm_head part 0",
        "computed, not measured: VRAM, memory, link, disk as assumed",
    ):
        assert line in result.output, result.output
    assert "  layer 2      41.2 kB  " in result.output


def test_json_has_every_layer_and_adds_up(pack_of: PackOf) -> None:
    found = facts(pack_of("llama"), *LAPTOP, "--host-layers", 0, "--vram-layers", 1)
    vram, layers = found["vram"], found["layers"]
    assert isinstance(vram, dict) and isinstance(layers, list)
    assert sum(size for name, size in vram.items() if name != "total") == vram["total"]
    assert [layer["tier"] for layer in layers] == ["disk", "disk", "vram", "disk"]
    streamed = sum(layer["bytes"] for layer in layers if layer["tier"] == "disk")
    assert found["streamed_bytes"] == found["disk_bytes"] == streamed
    assert found["pass_s"] == pytest.approx(streamed / 6e9)
    assert found["assumed"] == ["VRAM", "memory", "link", "disk"]


def test_more_context_takes_more_vram(pack_of: PackOf) -> None:
    caches = []
    for context in (100, 1000):
        vram = facts(pack_of("llama"), *LAPTOP, "--context", context)["vram"]
        assert isinstance(vram, dict)
        caches.append(vram["kv_cache"])
    assert caches[1] == 10 * caches[0] > 0
    many = facts(pack_of("llama"), *LAPTOP, "--context", 100, "--sequences", 10)["vram"]
    assert isinstance(many, dict) and many["kv_cache"] == caches[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--assume-vram", "1MB", "--assume-link", "13"], "1.0 MB of VRAM are .* too few"),
        ([*LAPTOP, "--vram", "1MB"], "1.0 MB of VRAM are .* too few"),
        ([*LAPTOP, "--vram", "6500kB", "--vram-layers", "4"], "4 layers take .* VRAM are left"),
        ([*LAPTOP, "--ram", "1kB", "--vram-layers", "0", "--host-layers", "2"], "2 layers take"),
        ([*LAPTOP, "--device", "cpu"], "leave out --device cpu"),
    ],
)
def test_what_does_not_fit_is_refused_with_figures(
    pack_of: PackOf, arguments: list[str], words: str
) -> None:
    with pytest.raises(CapacityError, match=words):
        run(pack_of("llama"), *arguments)


@pytest.mark.parametrize(
    "arguments",
    ["plan --vram 8GiB", "plan --vram-layers 3", "generate --vram-layers 3", "bench --vram 8GiB"],
)
def test_vram_of_a_cpu_is_refused(arguments: str) -> None:
    command, option, value = arguments.split()
    result = CliRunner().invoke(layerpack, [command, "out", "--device", "cpu", option, value])
    assert result.exit_code == 2
    said = f"Error: {option}: --device cpu has no VRAM; leave one of them out\n"
    assert result.output.endswith(said), result.output


def test_no_vram_is_a_bound_that_a_cpu_keeps(pack_of: PackOf) -> None:
    assert run(pack_of("llama"), "--device", "cpu", "--vram-layers", 0).exit_code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_here_a_bound_holds_and_layers_in_vram_are_refused(pack_of: PackOf) -> None:
    assert run(pack_of("llama"), "--vram", "8GiB").exit_code == 0
    with pytest.raises(CapacityError, match=r"3 layers are to be kept in VRAM, which a CPU "):
        run(pack_of("llama"), "--vram-layers", 3)


def test_neither_transformers_nor_bitsandbytes_is_imported(pack_of: PackOf) -> None:
    modules, output = imported_by("plan", str(pack_of("llama")), "--device", "cpu")
    assert not {"transformers", "bitsandbytes", "huggingface_hub"} & modules
    assert output.startswith("device       cpu\n")
