"""`verify` and `unpack` on the command line: what they print, how they end, what they import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.packs.tiny import write_tiny_pack
from support.runs.faults import Disk

from layerpack.cli import main as cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[object, str, str]:
    """Exit code, standard output, the last line of standard error."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code, out, (err.strip().splitlines() or [""])[-1]


def test_verify_says_all_is_right_or_names_each_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = tmp_path / "tiny"
    write_tiny_pack(pack)
    code, out, err = run(capsys, "verify", pack)
    assert not code and not err
    assert out.startswith(f"{pack}: 6 files, ") and " GB/s" in out and out.count("\n") == 1
    (pack / "config.json").unlink()
    (pack / "head.safetensors").write_bytes(b"")
    code, out, err = run(capsys, "verify", pack)
    assert code == 1
    assert out.splitlines() == [
        f"{pack}/config.json: is missing",
        f"{pack}/head.safetensors: has 0 of {4096 + 32} bytes",
    ]
    assert err.endswith(f"error: {pack}: 2 of 6 files differ; restore them or convert again")


def test_a_path_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = tmp_path / "tiny"
    manifest = write_tiny_pack(pack)
    disk = Disk(monkeypatch)
    disk.arm("error")
    code, out, _ = run(capsys, "verify", pack)
    disk.disarm()
    assert code == 1
    assert out.splitlines() == [
        f"{pack}/{name}: reading {file_bytes} bytes from 0 failed (Input/output error, EIO); "
        "check the disk"
        for name, file_bytes in sorted(
            [(blob.file, blob.file_bytes) for blob in manifest.blobs]
            + [(file.name, file.file_bytes) for file in manifest.files]
        )
    ]
    (pack / "layerpack.json").unlink()
    for command, *options in (["verify"], ["generate", "--prompt", "a"]):
        code, out, err = run(capsys, command, pack, *options)
        assert (code, out) == (1, "")
        assert err == (
            f"layerpack: error: {pack}: no layerpack.json in it, so not a pack; "
            "make one with `layerpack convert`"
        )
    code, _, err = run(capsys, "generate", pack, "--prompt", "a", "--verify")
    assert code == 1 and err.count(str(pack)) == 1


def test_unpack_refuses_a_plain_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_pack(tmp_path / "tiny")
    code, _, err = run(capsys, "unpack", tmp_path / "tiny", tmp_path / "out")
    assert code == 1 and err.endswith("is not compressed; use it as it is")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["formats.verify", "convert.unpack", "cli.commands.verify_cmd"])
def test_neither_needs_torch(module: str) -> None:
    code = (
        f"import sys, layerpack.{module}\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
