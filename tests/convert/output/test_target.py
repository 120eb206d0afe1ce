"""What may stand under the target's name, and what --force never takes away."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.packs.unfinished import partial_of

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


def test_nor_is_a_pack_whose_path_begins_at_home(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    convert(str(make_checkpoint("llama")), tmp_path / "packed")
    with pytest.raises(TargetError, match="is the source itself"):
        convert("~/packed", tmp_path / "packed", FORCE)


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


@pytest.mark.parametrize("force", [False, True])
def test_what_came_during_the_work_is_not_replaced(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, force: bool
) -> None:
    source, out = str(make_checkpoint("llama")), tmp_path / "out"
    options = ConvertOptions(force=force)

    def progress(done_bytes: int, total_bytes: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("precious")

    with pytest.raises(TargetError, match=f"^{out}: exists"):
        convert(source, out, options, progress)
    assert contents(out) == {"thesis.txt": b"precious"}
    assert (partial_of(out) / "pack" / "layer-000.safetensors").is_file()
    (out / "thesis.txt").unlink()
    convert(source, out, options)
    assert (out / "layerpack.json").is_file() and not partial_of(out).exists()


@pytest.mark.parametrize("calls", [1, 2])
def test_ctrl_c_between_the_two_renames_keeps_a_pack(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Unpacking in place is the worst case: what is replaced is all there is."""
    packed = tmp_path / "packed"
    convert(str(make_checkpoint("llama")), packed, ConvertOptions(zstd_level=1))
    before, rename, seen = contents(packed), os.rename, []

    def interrupted(old: Any, new: Any) -> None:
        rename(old, new)
        if packed in (old, new):
            seen.append(new)
            if len(seen) == calls:
                raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(packed, packed, force=True)
    assert [path.name for path in tmp_path.glob("packed*")] == ["packed"]
    if calls == 1:
        assert contents(packed) == before
    else:
        assert (packed / "layer-000.safetensors").is_file()


def test_a_mount_point_is_refused_before_the_work(
    make_checkpoint: MakeCheckpoint, small_disk: Path
) -> None:
    with pytest.raises(TargetError, match=r"a mount point, .*; name a directory inside it"):
        convert(str(make_checkpoint("llama")), small_disk)
    assert not partial_of(small_disk).exists()


def test_a_file_system_without_locks_and_synced_directories_will_do(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    fsync = os.fsync

    def not_known(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def files_only(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(fcntl, "flock", not_known)
    monkeypatch.setattr(os, "fsync", files_only)
    convert(str(make_checkpoint("llama")), tmp_path / "out")
    assert (tmp_path / "out" / "layerpack.json").is_file()


def test_unfinished_work_of_another_user_is_told_as_such(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (partial_of(out) / "pack").mkdir(parents=True)
    (partial_of(out) / "lock").mkdir()  # as little to be opened as a file without permission
    with pytest.raises(TargetError, match="cannot be written"):
        convert(str(make_checkpoint("llama")), out)
