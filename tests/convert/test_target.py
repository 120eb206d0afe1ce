"""What may stand under the target's name, and what --force never takes away."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from layerpack.convert import ConvertOptions, convert
from layerpack.convert.unpack import unpack
from layerpack.formats.errors import TargetError

FORCE = ConvertOptions(force=True)
MakeCheckpoint = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("target", ["ck", "ck/../ck", "link", "."])
def test_the_source_is_never_replaced(
    target: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.rename(make_checkpoint("llama"), tmp_path / "ck")
    (tmp_path / "link").symlink_to("ck")
    monkeypatch.chdir(tmp_path / "ck" if target == "." else tmp_path)
    before = contents(tmp_path)
    with pytest.raises(TargetError, match="is the source itself"):
        convert(str(tmp_path / "ck"), target, FORCE)
    assert contents(tmp_path) == before


def test_nor_is_a_directory_that_holds_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.rename(make_checkpoint("llama"), tmp_path / "ck")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for target in (tmp_path, Path(".")):
        with pytest.raises(TargetError, match="holds the source"):
            convert("ck", target, FORCE)
    with pytest.raises(TargetError, match="name is empty"):
        convert("ck", "", FORCE)
    assert contents(tmp_path) == before


def test_only_packs_are_replaced(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = str(make_checkpoint("llama"))
    thesis, file = tmp_path / "project" / "thesis.txt", tmp_path / "file"
    thesis.parent.mkdir()
    for path in (thesis, file):
        path.write_text("precious")
    convert(source, tmp_path / "packed", ConvertOptions(zstd_level=1))
    for target in (thesis.parent, file):
        with pytest.raises(TargetError, match="exists and is no pack"):
            convert(source, target, FORCE)
        with pytest.raises(TargetError, match="exists and is no pack"):
            unpack(tmp_path / "packed", target, force=True)
    assert thesis.read_text() == file.read_text() == "precious"
    convert(source, tmp_path / "packed", FORCE)
    assert not list((tmp_path / "packed").glob("*.zst"))


def test_unpacking_replaces_what_it_reads_if_asked_but_no_directory_around_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    packed = tmp_path / "folder" / "packed"
    packed.parent.mkdir()
    convert(str(make_checkpoint("llama")), packed, ConvertOptions(zstd_level=1))
    before = contents(tmp_path)
    with pytest.raises(TargetError, match="exists and is no pack"):
        unpack(packed, packed.parent, force=True)
    assert contents(tmp_path) == before
    unpack(packed, packed, force=True)
    assert (packed / "layer-000.safetensors").is_file()
