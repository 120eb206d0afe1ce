"""Compressed conversions: resumed to the same bytes, verified, and unpacked to the plain pack."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.packs.comparing import compressed, differing
from support.packs.unfinished import StopError, partial_of

from layerpack.convert import ConvertOptions, convert
from layerpack.convert.output.remaining import Remaining
from layerpack.convert.unpack import unpack
from layerpack.formats.errors import (
    DiskFullError,
    PackError,
    PackVersionError,
    TargetError,
)
from layerpack.formats.manifest.document import dump_manifest, parse_manifest
from layerpack.formats.manifest.facts import MANIFEST_NAME
from layerpack.formats.pack import Pack
from layerpack.formats.units import PAGE_BYTES, align_up
from layerpack.formats.verify import verify_pack

ZSTD = ConvertOptions(zstd_level=1)


@pytest.fixture(autouse=True)
def small_frames() -> Iterator[None]:
    with compressed(16384):
        yield


@pytest.fixture
def source(make_checkpoint: Any) -> Path:
    path: Path = make_checkpoint("llama", num_hidden_layers=6, tie_word_embeddings=False)
    return path


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    convert(str(source), tmp_path / "packed", ZSTD)
    return tmp_path / "packed"


def stop_at(share: float) -> Any:
    def progress(done_bytes: int, total_bytes: int) -> None:
        if done_bytes >= share * total_bytes:
            raise StopError

    return progress


def test_unpacked_it_is_the_plain_pack(source: Path, packed: Path, tmp_path: Path) -> None:
    plain = convert(str(source), tmp_path / "plain")
    manifest = Pack.open(packed).manifest
    assert manifest.raw_bytes == plain.total_bytes > manifest.total_bytes
    assert all(blob.ratio < 1 for blob in manifest.layers)
    seen: list[tuple[int, int]] = []
    assert unpack(packed, tmp_path / "out", lambda *sizes: seen.append(sizes)) == plain
    assert not differing(tmp_path / "plain", tmp_path / "out")
    assert seen[-1] == (plain.total_bytes, plain.total_bytes)
    with pytest.raises(PackError, match="not compressed"):
        unpack(tmp_path / "out", tmp_path / "again")


def test_the_manifest_says_how_and_older_readers_would_refuse_it(packed: Path) -> None:
    raw = (packed / MANIFEST_NAME).read_bytes()
    manifest = parse_manifest(raw)
    assert manifest.compression is not None and manifest.compression.level == 1
    assert dump_manifest(manifest) == raw
    assert b'"features": [\n  "zstd"\n ]' in raw
    with pytest.raises(PackVersionError, match="install a newer"):
        parse_manifest(raw.replace(b'"zstd"', b'"lz77"'))
    plain = raw.replace(b'"features": [\n  "zstd"\n ]', b'"features": []')
    with pytest.raises(PackError, match="frames, or none, against features"):
        parse_manifest(plain)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_broken_conversion_goes_on_to_the_same_bytes(
    source: Path, packed: Path, tmp_path: Path, share: float
) -> None:
    out = tmp_path / "out"
    with pytest.raises(StopError):
        convert(str(source), out, ZSTD, stop_at(share))
    done = {f.name: f.stat().st_ino for f in (partial_of(out) / "pack").glob("*.safetensors*")}
    assert done
    with pytest.raises(TargetError, match="other options"):
        convert(str(source), out, ConvertOptions(zstd_level=2))
    with pytest.raises(TargetError, match="other options"):
        convert(str(source), out)
    with pytest.raises(TargetError, match="unfinished conversion"):
        unpack(packed, out)
    with open(partial_of(out) / "pack" / min(done), "ab") as file:
        file.write(b"x")  # a blob of another size is made again
    convert(str(source), out, ZSTD)
    assert not differing(packed, out)
    kept = [name for name, inode in done.items() if (out / name).stat().st_ino == inode]
    assert len(kept) >= len(done) - 2


def test_random_damage_is_found_and_never_unpacked(packed: Path, tmp_path: Path) -> None:
    chance, files = random.Random(2), sorted(packed.iterdir())
    assert not verify_pack(packed).differences
    for number in range(60):
        file = files[number % len(files)]
        raw = file.read_bytes()
        changed = bytearray(raw)
        changed[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        assert [found.file for found in verify_pack(packed).differences] == [file.name]
        try:
            unpack(packed, tmp_path / "out")
        except PackError:
            assert not (tmp_path / "out").exists()
        else:  # the zeros between frames belong to no tensor
            assert file.suffix == ".zst"
            shutil.rmtree(tmp_path / "out")
        assert not partial_of(tmp_path / "out").exists()
        file.write_bytes(raw)


def test_a_broken_unpacking_leaves_nothing(packed: Path, tmp_path: Path) -> None:
    for error in (StopError, KeyboardInterrupt):

        def progress(done_bytes: int, total_bytes: int, error: type = error) -> None:
            if done_bytes > total_bytes / 2:
                raise error

        before = sorted(tmp_path.iterdir())
        with pytest.raises(error):
            unpack(packed, tmp_path / "out", progress)
        assert sorted(tmp_path.iterdir()) == before
    # What kill -9 leaves is cleared away by the next run.
    (partial_of(tmp_path / "out") / "pack").mkdir(parents=True)
    (partial_of(tmp_path / "out") / "pack" / "stray").write_text("x")
    unpack(packed, tmp_path / "out")
    assert not (tmp_path / "out" / "stray").exists()
    with pytest.raises(TargetError, match="exists"):
        unpack(packed, tmp_path / "out")
    unpack(packed, packed, force=True)
    assert not differing(packed, tmp_path / "out")


def leave_free(disk: Path, free_bytes: int) -> None:
    """Fill the disk up to that."""
    (disk / "filler").unlink(missing_ok=True)
    with open(disk / "filler", "wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - free_bytes))


def test_room_for_the_compressed_pack_is_enough(
    make_checkpoint: Any, tmp_path: Path, small_disk: Path
) -> None:
    source, packed = make_checkpoint("llama", vocab_size=2000), tmp_path / "packed"
    heard: list[Remaining] = []
    with compressed(1 << 18):  # large enough for planes to pay
        plain_bytes = convert(str(source), packed, ZSTD).raw_bytes
    packed_bytes = sum(align_up(file.stat().st_size) for file in packed.iterdir())
    room_bytes = packed_bytes + 8 * PAGE_BYTES  # the journal, its new version, the lock …
    assert room_bytes < plain_bytes
    leave_free(small_disk, room_bytes)
    with pytest.raises(DiskFullError, match=r"disk: [\d.]+ [kM]B of pack are to be written"):
        convert(str(source), small_disk / "out")
    with compressed(1 << 18):
        convert(str(source), small_disk / "out", ZSTD, announce=heard.append)
    assert not differing(packed, small_disk / "out")
    (work,) = heard
    assert work.least_pack_bytes < packed_bytes < plain_bytes <= work.pack_bytes
    assert work.fits_if_small


def test_what_can_in_no_case_fit_is_refused_before(
    source: Path, packed: Path, small_disk: Path
) -> None:
    heard: list[Remaining] = []
    leave_free(small_disk, Pack.open(packed).manifest.total_bytes // 3)
    with pytest.raises(DiskFullError, match=r"at most [\d.]+ kB of pack are to be written but"):
        convert(str(source), small_disk / "out", ZSTD, announce=heard.append)
    assert not heard[0].fits_if_small
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_up_goes_on_to_the_same_bytes(
    source: Path, packed: Path, small_disk: Path
) -> None:
    """What is done by then is counted as it is stored: room for the rest is enough."""
    manifest = Pack.open(packed).manifest
    leave_free(small_disk, manifest.raw_bytes * 2 // 3)
    with pytest.raises(DiskFullError, match=r"at most .*still to be written .*make room for"):
        convert(str(source), small_disk / "out", ZSTD)
    done = {f.name: f.stat().st_size for f in (partial_of(small_disk / "out") / "pack").iterdir()}
    assert done and not (small_disk / "out").exists()
    small_bytes = sum(align_up(file.file_bytes) for file in manifest.files)
    small_bytes += align_up((packed / MANIFEST_NAME).stat().st_size)
    leave_free(small_disk, manifest.total_bytes - sum(done.values()) + small_bytes + 8 * PAGE_BYTES)
    convert(str(source), small_disk / "out", ZSTD)
    assert not differing(packed, small_disk / "out")


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_a_disk_that_fills_up_while_unpacking(
    packed: Path, tmp_path: Path, small_disk: Path, share: float
) -> None:
    filler = small_disk / "filler"

    def fill(done_bytes: int, total_bytes: int) -> None:
        if done_bytes < share * total_bytes or filler.exists():
            return
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(PAGE_BYTES)):
                pass

    what_to_do = r"the disk is full, .*B .* still to be written .*; make room for [\d.]+ kB more"
    with pytest.raises(DiskFullError, match=what_to_do) as caught:
        unpack(packed, small_disk / "out", fill)
    assert str(caught.value).endswith("run the same command again")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    with pytest.raises(DiskFullError, match="to be written but"):
        unpack(packed, small_disk / "out")
    filler.unlink()
    unpack(packed, small_disk / "out")
    unpack(packed, tmp_path / "plain")
    assert not differing(tmp_path / "plain", small_disk / "out")


def test_room_is_asked_for_before(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(DiskFullError, match="make room for"):
        unpack(packed, tmp_path / "out")
    assert not partial_of(tmp_path / "out").exists()
