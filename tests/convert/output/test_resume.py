"""Broken conversions (kill -9, full disk, errors): the same command ends in the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support.packs.comparing import convert_to_many_frames, differing
from support.packs.unfinished import partial_of, run_until, stamps

from layerpack.convert import ConvertOptions, convert
from layerpack.convert.output.journal import BlobRecord, Journal, read_journal
from layerpack.formats.errors import DiskFullError, TargetError
from layerpack.formats.verify import verify_pack


@pytest.fixture
def source(make_checkpoint: Any) -> Path:
    path: Path = make_checkpoint("llama", num_hidden_layers=10, max_shard_size="150KB")
    return path


@pytest.mark.parametrize(("zstd_level", "kills"), [(None, 8), (1, 4)])
def test_kill_at_random_moments(
    source: Path, tmp_path: Path, zstd_level: int | None, kills: int
) -> None:
    whole, options = tmp_path / "whole", ConvertOptions(zstd_level=zstd_level)
    convert_to_many_frames(source, whole, options)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["layerpack.convert.api", "transformers.models.llama.modeling_llama"]
    )
    target = tmp_path / "out"

    def start() -> Any:
        """A process that converts, once it has begun to."""
        process = context.Process(target=convert_to_many_frames, args=(source, target, options))
        process.start()
        while not partial_of(target).exists() and process.is_alive():
            time.sleep(0.001)
        return process

    start().join()
    subprocess.run(["rm", "-r", str(target)], check=True)
    process, start_s = start(), time.monotonic()
    process.join()
    whole_s = time.monotonic() - start_s
    chance, lost, killed_at_work = random.Random(7), [], 0
    for index in range(kills):
        if target.exists():
            subprocess.run(["rm", "-r", str(target)], check=True)
        process = start()
        time.sleep(chance.random() * whole_s)
        process.kill()
        process.join()
        if target.exists():
            assert not differing(whole, target)
            continue
        killed_at_work += 1
        before = stamps(target)
        begun = (partial_of(target) / "pack").glob("*.safetensors*")
        lost.append(len({f.name.removesuffix(".partial") for f in begun} - before.keys()))
        again = start()
        again.join()
        assert again.exitcode == 0
        assert not differing(whole, target), index
        for name, stamp in before.items():
            stat = (target / name).stat()
            assert (stat.st_ino, stat.st_mtime_ns) == stamp, f"{name} was converted again"
        assert not partial_of(target).exists()
    assert max(lost) <= 1
    assert killed_at_work >= kills // 2


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which file is synced")
def test_everything_is_on_the_disk_before_the_journal_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What power loss may undo, in the order in which it could not any more."""
    events: list[tuple[str, str]] = []
    fsync, rename, note = os.fsync, os.rename, Journal.blob

    def synced(handle: int) -> None:
        fsync(handle)
        events.append(("synced", os.readlink(f"/proc/self/fd/{handle}")))

    def renamed(old: Any, new: Any) -> None:
        rename(old, new)
        events.append(("renamed", str(new)))

    def noted(self: Journal, record: BlobRecord) -> None:
        events.append(("to be noted", record.file))
        note(self, record)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(Journal, "blob", noted)
    convert(str(source), tmp_path / "out")
    partial = partial_of(tmp_path / "out")
    blobs = [name for what, name in events if what == "to be noted"]
    assert len(blobs) == 12
    for name in blobs:
        path = str(partial / "pack" / name)
        here = [event for event in events if event[1] in (path, f"{path}.partial", name)]
        assert [what for what, _ in here] == ["synced", "renamed", "to be noted"]
        between = events[events.index(("renamed", path)) : events.index(("to be noted", name))]
        assert ("synced", str(partial / "pack")) in between
    first = events.index(("to be noted", blobs[0]))
    assert ("synced", str(partial)) in events[:first]
    assert ("synced", str(tmp_path)) in events[:first]
    after = events[events.index(("renamed", str(tmp_path / "out"))) - 1 :]
    assert [name for _, name in after] == [
        str(partial / "pack"),
        str(tmp_path / "out"),
        str(tmp_path),
    ]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_an_error_keeps_what_is_done(source: Path, tmp_path: Path, share: float) -> None:
    convert(str(source), tmp_path / "whole")
    run_until(source, tmp_path / "out", share)
    assert not (tmp_path / "out").exists()
    before = stamps(tmp_path / "out") if partial_of(tmp_path / "out").exists() else {}
    assert bool(before) == (share > 0)
    convert(str(source), tmp_path / "out")
    assert not differing(tmp_path / "whole", tmp_path / "out")
    for name, stamp in before.items():
        stat = (tmp_path / "out" / name).stat()
        assert (stat.st_ino, stat.st_mtime_ns) == stamp


def test_a_journal_torn_at_any_byte(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "whole")
    run_until(source, tmp_path / "out", 0.6)
    journal = partial_of(tmp_path / "out") / "journal"
    raw = journal.read_bytes()
    done = read_journal(journal)
    lines = raw.count(b"\n")
    for length in range(len(raw) + 1):
        journal.write_bytes(raw[:length])
        kept = read_journal(journal)
        assert kept.blobs.items() <= done.blobs.items()
        assert len(kept.blobs) + len(kept.source_digests) >= raw[:length].count(b"\n") - 1
    for length in random.Random(1).sample(range(len(raw)), 4):
        copy = tmp_path / f"torn-{length}"
        subprocess.run(
            ["cp", "-a", str(partial_of(tmp_path / "out")), str(partial_of(copy))], check=True
        )
        (partial_of(copy) / "journal").write_bytes(raw[:length])
        convert(str(source), copy)
        assert not differing(tmp_path / "whole", copy)
    assert lines > 4


def test_a_changed_byte_in_the_journal_costs_its_line_alone(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "whole")
    run_until(source, tmp_path / "out", 0.6)
    journal = partial_of(tmp_path / "out") / "journal"
    raw = bytearray(journal.read_bytes())
    done = read_journal(journal)
    for position in range(0, len(raw), 3):
        raw[position] ^= 0x15
        journal.write_bytes(raw)
        kept = read_journal(journal)
        lost = len(done.blobs) + len(done.source_digests)
        lost -= len(kept.blobs) + len(kept.source_digests)
        assert lost <= 2  # two if the byte was a line's end
        assert kept.blobs.items() <= done.blobs.items()
        raw[position] ^= 0x15


def test_blobs_that_are_not_what_the_journal_says_are_made_again(
    source: Path, tmp_path: Path
) -> None:
    convert(str(source), tmp_path / "whole")
    run_until(source, tmp_path / "out", 0.6)
    pack = partial_of(tmp_path / "out") / "pack"
    with open(pack / "layer-000.safetensors", "r+b") as file:
        file.truncate(100)
    (pack / "layer-001.safetensors").unlink()
    (pack / "stray").write_text("x")
    convert(str(source), tmp_path / "out")
    assert not differing(tmp_path / "whole", tmp_path / "out")


def test_bytes_that_a_finished_blob_lost_are_found_by_verify(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_until(source, out, 0.6)
    name = min(stamps(out))
    with open(partial_of(out) / "pack" / name, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    convert(str(source), out)
    assert [difference.file for difference in verify_pack(out).differences] == [name]


def test_other_options_or_another_source_are_refused(
    source: Path, make_checkpoint: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_until(source, out, 0.5)
    with pytest.raises(TargetError, match="other options"):
        convert(str(source), out, ConvertOptions(block_size=128))
    other = make_checkpoint("mistral", name="other")
    with pytest.raises(TargetError, match="another source"):
        convert(str(other), out)
    config = source / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    with pytest.raises(TargetError, match="another source"):
        convert(str(source), out)
    assert not out.exists()
    manifest = convert(str(source), out, ConvertOptions(block_size=128, force=True))
    assert manifest.quantization and manifest.quantization.block_size == 128


def test_force_goes_on_with_its_own_unfinished_work(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(str(source), out, ConvertOptions(block_size=32))
    old = {f.name: f.read_bytes() for f in out.iterdir()}
    run_until(source, out, 0.5, force=True)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == old
    before = stamps(out)
    convert(str(source), out, ConvertOptions(force=True))
    assert all((out / name).stat().st_ino == inode for name, (inode, _) in before.items())
    assert not partial_of(out).exists()


def test_two_conversions_to_one_target(source: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def progress(done_bytes: int, total_bytes: int) -> None:
        if not seen:
            seen.append(done_bytes)
            with pytest.raises(TargetError, match="at work"):
                convert(str(source), tmp_path / "out")

    convert(str(source), tmp_path / "out", None, progress)
    assert seen and (tmp_path / "out").is_dir()


def test_a_disk_that_fills_up_at_ten_moments(
    source: Path, tmp_path: Path, small_disk: Path
) -> None:
    convert(str(source), tmp_path / "whole")
    filler, out = small_disk / "filler", small_disk / "out"
    full = 0
    for moment in range(10):

        def progress(done_bytes: int, total_bytes: int, moment: int = moment) -> None:
            if done_bytes < moment / 10 * total_bytes or filler.exists():
                return
            with open(filler, "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass

        with pytest.raises(DiskFullError, match=r"to be written .*B are free; make room for .*B"):
            convert(str(source), out, None, progress)
        full += 1
        assert not out.exists()
        filler.unlink()
    assert full == 10
    convert(str(source), out)
    assert not differing(tmp_path / "whole", out)


def test_a_disk_too_small_is_found_before_the_work(
    source: Path, tmp_path: Path, small_disk: Path
) -> None:
    with open(small_disk / "filler", "wb") as file:
        file.write(bytes(3 << 20 | 1 << 19))
    called = []
    with pytest.raises(DiskFullError, match="make room for"):
        convert(str(source), small_disk / "out", None, lambda *_: called.append(1))
    assert not called
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
