"""Files written past the page cache and through it: the same bytes, whatever the disk does."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerpack.formats import write
from layerpack.formats.units import PAGE_BYTES
from layerpack.formats.write import BufferedOutput, DirectOutput, Output, open_output

BUFFER_BYTES = 2 * PAGE_BYTES
Pwrite = Callable[[int, memoryview, int], int]


@pytest.fixture(scope="module", autouse=True)
def small_buffers() -> object:
    """Buffers of two pages, so that a few kilobytes fill all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "BUFFER_BYTES", BUFFER_BYTES)
        patch.setattr(write, "_BEGIN_BYTES", 5000)
        yield


@pytest.fixture
def direct_folder(tmp_path: Path) -> Path:
    """A directory whose file system takes direct writes; skips where there is none."""
    try:
        DirectOutput(tmp_path / "probe").close()
    except OSError as reason:
        pytest.skip(f"no direct writes in {tmp_path} ({reason})")
    return tmp_path


def content(length: int) -> bytes:
    return random.Random(length).randbytes(length)


def write_pieces(output: Output, data: bytes, cuts: list[int]) -> None:
    for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        piece = bytearray(data[begin:end])
        output.write(memoryview(piece))
        piece[:] = bytes(len(piece))  # the caller's memory is the caller's again
    output.finish()
    output.close()
    output.close()


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(0, 12 * BUFFER_BYTES),
    cuts=st.lists(st.integers(0, 12 * BUFFER_BYTES), max_size=6),
    direct=st.sampled_from([None, False]),
)
def test_pieces_of_any_size_make_the_file(
    length: int, cuts: list[int], direct: bool | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.bin"
    path.write_bytes(b"something longer that was here before" * 10_000)
    data = content(length)
    output = open_output(path, direct=direct)
    write_pieces(output, data, sorted(min(cut, length) for cut in cuts))
    assert path.read_bytes() == data


@pytest.mark.parametrize("seed", range(5))
def test_a_disk_that_takes_less_than_it_is_given(
    seed: int, direct_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, whole = random.Random(seed), os.pwrite

    def short(descriptor: int, data: memoryview, offset: int) -> int:
        written = whole(descriptor, data, offset)
        return written if chance.random() < 0.5 else chance.randint(PAGE_BYTES, written)

    monkeypatch.setattr(os, "pwrite", short)
    data = content(10 * BUFFER_BYTES + 123)
    write_pieces(open_output(direct_folder / "x", direct=True), data, [100, 9000, 70_000])
    assert (direct_folder / "x").read_bytes() == data


@pytest.mark.parametrize("failing", range(1, 7))
def test_an_error_of_the_thread_comes_out_and_leaves_no_thread(
    failing: int, direct_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = DirectOutput(direct_folder / "x")
    whole, calls = os.pwrite, []

    def fail(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="No space left"):
        write_pieces(output, content(5 * BUFFER_BYTES + 1), [7, 20_000])
    output.close()
    assert not any(thread.name.startswith("layerpack-output") for thread in threading.enumerate())


def test_a_disk_that_takes_nothing_is_no_endless_loop(
    direct_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = DirectOutput(direct_folder / "x")
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: 10)
    with pytest.raises(OSError, match="less than a page"):
        write_pieces(output, content(100), [])
    output.close()


@pytest.mark.parametrize("where", ["open", "pwrite"])
def test_a_file_system_without_direct_writes_is_written_through_the_cache(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("no O_DIRECT on this system")
    original = getattr(os, where)

    def refuse(*arguments: object) -> object:
        if where == "open" and not int(str(arguments[1])) & os.O_DIRECT:
            return original(*arguments)
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(os, where, refuse)
        with pytest.raises(OSError, match="Invalid argument"):
            open_output(tmp_path / "x", direct=True)
        output = open_output(tmp_path / "x")
    assert isinstance(output, BufferedOutput) and not output.direct
    write_pieces(output, content(20_000), [5])
    assert (tmp_path / "x").read_bytes() == content(20_000)


def test_what_cannot_be_opened_is_no_matter_of_direct_writes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_output(tmp_path / "nowhere" / "x")
    with pytest.raises(IsADirectoryError):
        open_output(tmp_path)
