"""Opening a pack whose files are not what the manifest says: the file is named, what to do, too."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from support.packs.small import write_small_pack

from layerpack.cli.main import main
from layerpack.formats.errors import PackError
from layerpack.formats.manifest.facts import MANIFEST_NAME
from layerpack.formats.pack import Pack

BLOB = "layer-001.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_small_pack(tmp_path / "pack")
    return tmp_path / "pack"


def test_a_whole_pack_opens(path: Path) -> None:
    pack = Pack.open(str(path))
    assert [blob.file for blob in pack.manifest.layers] == ["layer-000.safetensors", BLOB]
    assert pack.manifest.embedding.file == "embed.safetensors"
    for blob in pack.manifest.blobs:
        with safe_open(pack.blob_path(blob), framework="np") as file:
            assert set(file.keys()) == {entry.name for entry in blob.tensors}


@pytest.mark.parametrize("options", [{"tied": True}, {"double_quant": False}, {"num_layers": 1}])
def test_other_kinds_open(options: dict[str, bool], tmp_path: Path) -> None:
    manifest = write_small_pack(tmp_path / "pack", **options)  # type: ignore[arg-type]
    assert Pack.open(tmp_path / "pack").manifest == manifest


def test_constants_may_lie_at_odd_places(tmp_path: Path) -> None:
    odd = write_small_pack(tmp_path / "odd", hidden=45, inner=1)
    assert any(entry.dtype == "F32" and entry.offset_bytes % 4 for entry in odd.layers[0].tensors)
    assert Pack.open(tmp_path / "odd").manifest == odd


def test_blobs_may_be_links(path: Path, tmp_path: Path) -> None:
    shutil.move(path / BLOB, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path / BLOB)
    Pack.open(path)


def edit(position: int, data: bytes) -> Callable[[Path], object]:
    def damage(file: Path) -> None:
        raw = bytearray(file.read_bytes())
        raw[position : position + len(data)] = data
        file.write_bytes(raw)

    return damage


def make_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def rename_in_header(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"layers.1.norm", b"layers.2.norm", 1))


def other_dtype(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"F16" ', 1))


def rename_weight(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'1.up.weight"', b'1.us.weight"', 1))


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda file: file.unlink(), "listed in layerpack.json but cannot be read"),
    "a directory": (make_directory, "bytes; restore it or convert"),
    "empty": (lambda file: file.write_bytes(b""), "has 0 of 12392 bytes; restore it"),
    "truncated": (lambda file: os.truncate(file, 12391), "has 12391 of 12392 bytes"),
    "grown": (lambda file: os.truncate(file, 12393), "has 12393 of 12392 bytes"),
    "header length": (edit(0, b"\xff" * 8), "states a header of 18446744073709551615 bytes"),
    "header torn": (edit(20, b"\0"), "the safetensors header is not valid JSON"),
    "all zero": (edit(0, bytes(12392)), "the safetensors header is not valid JSON"),
    "tensor renamed": (rename_in_header, "its header differs from layerpack.json"),
    "dtype changed": (other_dtype, "its header differs from layerpack.json"),
    "weight renamed": (rename_weight, "its header differs from layerpack.json"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_one_damaged_blob_is_named(
    defect: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = DEFECTS[defect]
    damage(path / BLOB)
    with pytest.raises(PackError) as caught:
        Pack.open(path)
    assert str(caught.value).startswith(str(path / BLOB)) and message in str(caught.value)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(path)])
    output = capsys.readouterr()
    assert ended.value.code == 1 and not output.out
    assert output.err == f"layerpack: error: {caught.value}\n"


def test_a_damaged_manifest_is_one_line_too(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (path / MANIFEST_NAME).read_text()
    for damaged, message in (
        (text[:-9], "not valid JSON"),
        (text.replace(f'"{BLOB}"', '"../x.safetensors"'), "'../x.safetensors' is not a plain"),
        (text.replace('"format_version": 1', '"format_version": 2'), "install a newer layerpack"),
    ):
        (path / MANIFEST_NAME).write_text(damaged)
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(path)])
        output = capsys.readouterr()
        assert ended.value.code == 1 and output.err.count("\n") == 1
        assert f"layerpack: error: {path / MANIFEST_NAME}: " in output.err
        assert message in output.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(path: Path) -> None:
    for name in (BLOB, MANIFEST_NAME):
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(PackError, match=name):
            Pack.open(path)
