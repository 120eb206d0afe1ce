"""`layerpack bench` as a user meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from layerpack.cli import main as cli
from layerpack.runtime.bench import row as bench_runner

PackOf = Callable[..., Path]
QUICK = ("--device", "cpu", "--context", "4", "--passes", "1", "--rows", "host,disk-buffered")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str, str]]:
    """Exit code, standard output and standard error of `layerpack bench`."""

    def get(*arguments: str | Path) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", *map(str, arguments)])
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return get


Run = Callable[..., tuple[object, str, str]]


def test_table_and_picture(run: Run, pack_of: PackOf, tmp_path: Path) -> None:
    code, out, err = run(pack_of("llama"), *QUICK, "--plot", tmp_path / "x.png")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["row", "host", "disk-buffered"]
    begun, host, _, disk = err.splitlines()
    assert begun == "[host: layerpack: host memory in place, default attention]"
    assert re.fullmatch(r"\[host: \d+\.\d{3} s a pass, median of 1\]", host)
    assert disk.startswith("[disk-buffered: ") and disk.endswith(" s a pass, median of 1]")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_json(run: Run, pack_of: PackOf) -> None:
    code, out, _ = run(pack_of("llama"), *QUICK, "--json")
    assert code == 0
    report = json.loads(out)
    assert set(report) == {
        "benchmark",
        "machine",
        "pack",
        "num_layers",
        "context_tokens",
        "link_gb_s",
        "disk_gb_s",
        "rows",
        "left_out",
        "interrupted",
    }
    assert report["context_tokens"] == 4 and report["link_gb_s"] is None
    host, disk = report["rows"]
    assert (
        set(host)
        == set(disk)
        == {
            "name",
            "switches",
            "median_s",
            "min_s",
            "max_s",
            "passes",
            "moved_bytes",
            "link_bytes",
            "disk_bytes",
            "timed_layers",
            "note",
            "gb_s",
            "limit_s",
            "ratio",
        }
    )
    assert host["ratio"] is None
    assert disk["ratio"] == pytest.approx(disk["median_s"] / disk["limit_s"])
    assert disk["limit_s"] == pytest.approx(disk["disk_bytes"] / 1e9 / report["disk_gb_s"])


def test_what_was_measured_is_told_although_a_later_row_is_killed(
    pack_of: PackOf, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "layerpack.cli.main", "bench", str(pack_of("llama"))]
    command += ["--device", "cpu", "--context", "4", "--passes", "1", "--layers", "1"]
    command += ["--scratch", str(tmp_path), "--rows", "bf16-sync,nf4-sync-pageable,disk-buffered"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(4)]
        process.kill()
    assert lines[0] == "[bf16-sync: left out: pinned memory matters to a CUDA device only]\n"
    assert lines[1].startswith("[nf4-sync-pageable: NF4, synchronous")
    assert lines[2].endswith(" s a pass, median of 1, scaled up from a few layers]\n")
    assert lines[3].startswith("[disk-buffered: layerpack: disk")


def test_usage_errors(run: Run, pack_of: PackOf, tmp_path: Path) -> None:
    code, _, err = run(pack_of("llama"), "--rows", "host,hots")
    assert code == 2 and "no row hots; there are bf16-eager, " in err
    code, _, err = run(pack_of("llama"), "--plot", tmp_path / "nowhere" / "x.png")
    assert code == 2 and "no such directory" in err


def test_more_context_than_the_model_has_is_refused_before_any_row(
    run: Run, pack_of: PackOf
) -> None:
    code, out, err = run(pack_of("llama"), *QUICK, "--context", "256")
    assert (code, out) == (1, "")
    assert err == (
        "layerpack: error: --context 256 and --passes 1 make 257 tokens, "
        "the model's context is 256; use a smaller --context\n"
    )
    assert run(pack_of("llama"), *QUICK, "--context", "255", "--rows", "host")[0] == 0


def test_no_pack_is_one_line(run: Run, tmp_path: Path) -> None:
    code, out, err = run(tmp_path, *QUICK)
    assert (code, out) == (1, "")
    assert err.startswith(f"layerpack: error: {tmp_path}: no layerpack.json in it")


def test_without_matplotlib_the_extra_is_named(
    run: Run, pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(pack_of("llama"), *QUICK, "--plot", tmp_path / "x.png")
    assert (code, out) == (1, "")
    assert "pip install layerpack[plot]" in err


def test_ctrl_c_prints_what_is_done(
    run: Run, pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_runner, "evict", stop)  # first called in the second row
    code, out, _ = run(pack_of("llama"), *QUICK)
    assert code == 130
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["row", "host"]
    assert out.endswith("interrupted; later rows were not measured\n")
