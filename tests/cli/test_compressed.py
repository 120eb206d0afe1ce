"""The commands on a compressed pack: what they show, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.packs.comparing import compressed

from layerpack.cli import main as cli
from layerpack.convert import ConvertOptions, convert
from layerpack.convert.forecast import forecast
from layerpack.convert.output.unfinished import read_unfinished
from layerpack.formats.frames.table import Coding
from layerpack.formats.pack import Pack
from layerpack.formats.units import human_bytes

ZSTD = ConvertOptions(zstd_level=1)
Run = Callable[..., tuple[object, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Exit code, standard output, the last line of standard error."""

    def get(*arguments: object) -> tuple[object, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, (err.strip().splitlines() or [""])[-1]

    return get


@pytest.fixture(scope="module")
def source(checkpoint_of: Callable[..., Path]) -> Path:
    return checkpoint_of("llama")


@pytest.fixture(scope="module")
def pack(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "packed"
    with compressed(16384):
        convert(str(source), out, ZSTD)
    return out


def test_inspect_shows_the_ratio(run: Run, pack: Path) -> None:
    found = json.loads(run("inspect", pack, "--json")[1])
    how, blobs = found["compression"], found["blobs"]
    assert found["total_bytes"] == sum((pack / blob["file"]).stat().st_size for blob in blobs)
    assert how["raw_bytes"] == sum(blob["raw_size_bytes"] for blob in blobs)
    assert how["ratio"] == found["total_bytes"] / how["raw_bytes"] < 1
    assert found["pass"]["disk_bytes"] < found["pass"]["total_bytes"]
    code, out, _ = run("inspect", pack)
    assert not code and f" at level 1: {how['ratio']:.3f} of " in out
    assert "layers 0-2" in out and out.endswith(", decompressing not counted\n")


def test_inspect_of_an_unfinished_one_counts_what_is_done(
    run: Run, source: Path, tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    def stop(done_bytes: int, total_bytes: int) -> None:
        if done_bytes > 0.7 * total_bytes:
            raise StopError

    with compressed(16384), pytest.raises(StopError):
        convert(str(source), tmp_path / "out", ZSTD, stop)
    (partial,) = tmp_path.iterdir()
    work = read_unfinished(partial)
    assert set(work.done) == {file.name for file in (partial / "pack").glob("*.safetensors*")}
    assert any(name.endswith(".zst") for name in work.done)
    assert 0 < work.stored_bytes < work.done_bytes < work.total_bytes
    (partial / "pack" / f"{work.missing[0]}.partial").write_bytes(b"123")
    text = run("inspect", tmp_path / "out")[1]
    assert f"{len(work.done)} of 5 blobs" in text
    assert f", compressed to {human_bytes(work.stored_bytes)}\n" in text
    assert f"being written {work.missing[0]}, 3 B of at most " in text


def test_the_room_it_takes_is_a_bound_beforehand(
    run: Run, source: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_bytes = Pack.open(pack).manifest.raw_bytes
    assert f"writes {human_bytes(plain_bytes)} (less with --zstd)" in run("inspect", source)[1]
    assert forecast(str(source), ZSTD) == forecast(str(source))
    convert_it = ("convert", source, tmp_path / "out", "--zstd", 1, "--device", "cpu", "--force")
    _, _, err = run(*convert_it)
    assert re.search(r" layers: at most [\d.]+ kB of pack to write, ", err)

    class Usage:
        free = plain_bytes - 1

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    code, _, err = run(*convert_it)
    assert not code and err.startswith("it fits only if compression makes it small enough")


def test_plan_says_whether_it_pays(run: Run, pack: Path) -> None:
    gpu = ("--assume-vram", "7GB", "--assume-link", 13, "--assume-ram", "16GB")
    disk = ("--vram-layers", 0, "--host-layers", 0)
    code, out, _ = run("plan", pack, *gpu, *disk, "--assume-disk", 0.0001)
    assert not code and out.count("compression pays") == 1
    found = json.loads(run("plan", pack, *gpu, *disk, "--assume-disk", 1000, "--json")[1])
    how = found["compression"]
    assert how["decode_gb_s"] > 0 and not how["pays"]
    assert found["disk_bytes"] == how["stored_bytes"] < how["raw_bytes"] == found["streamed_bytes"]
    assert found["pass_s"] == how["decode_s"] > how["unpacked_pass_s"]


def test_errors_are_those_of_the_plain_pack(
    run: Run, source: Path, pack: Path, tmp_path: Path
) -> None:
    convert(str(source), tmp_path / "plain")
    compare = ("--stats", "--json")
    rows = json.loads(run("inspect", pack, *compare)[1])["errors"]
    plain = json.loads(run("inspect", tmp_path / "plain", *compare)[1])["errors"]
    assert [{**row, "file": row["file"].removesuffix(".zst")} for row in rows] == plain
    assert any(row["error"] > 0.05 for row in rows)


def test_errors_of_a_damaged_pack_are_not_made_up(run: Run, pack: Path, tmp_path: Path) -> None:
    shutil.copytree(pack, damaged := tmp_path / "damaged")
    blob = Pack.open(damaged).manifest.layers[1]
    assert blob.frames is not None
    frame = next(frame for frame in blob.frames.frames[1:] if frame.coding is Coding.ZSTD)
    with open(damaged / blob.file, "r+b") as file:
        file.seek(frame.offset_bytes)
        file.write(b"zstd's own mark is gone")
    code, _, err = run("inspect", damaged, "--stats")
    assert code == 1
    assert f"{blob.file}: the frame at byte {frame.offset_bytes} " in err
    assert err.endswith("run `layerpack verify`")


def test_bench_needs_the_plain_pack_and_says_so(run: Run, pack: Path) -> None:
    code, _, err = run("bench", pack, "--device", "cpu")
    assert code == 1
    assert "packed: is compressed, " in err and "run `layerpack unpack` first" in err


def test_generate_says_what_the_plain_pack_says(
    run: Run, source: Path, pack: Path, tmp_path: Path
) -> None:
    convert(str(source), tmp_path / "plain")
    words = ("--prompt", "hello", "--max-new-tokens", 8, "--device", "cpu", "--verify")
    code, plain, _ = run("generate", tmp_path / "plain", *words)
    assert not code and plain.strip()
    assert run("generate", pack, *words)[:2] == (0, plain)
