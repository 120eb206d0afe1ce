"""Files leave the page cache when a measurement wants them from the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layerpack.runtime.measure.page_cache import evict


def is_cached(path: Path) -> bool:
    """Whether the file's first page can be read without a disk. Skips where nobody tells."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:
        pytest.skip("this file system does not say what is cached")
    finally:
        os.close(descriptor)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="asks Linux what is cached")
def test_a_file_that_was_just_written_is_evicted(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for path in (old, new):
        path.write_bytes(bytes(1 << 20))
        assert is_cached(path)
    os.sync()
    evict(old)
    if is_cached(old):
        pytest.skip("this file system keeps its files in memory")
    new.write_bytes(b"x" * (1 << 20))
    evict(new)
    assert not is_cached(new)


def test_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    evict(tmp_path / "nowhere")
