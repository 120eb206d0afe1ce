"""A conversion goes on however its source is spelt, and with no other source."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.packs.comparing import differing
from support.packs.unfinished import partial_of, run_until, stamps

from layerpack.convert import convert
from layerpack.formats.errors import TargetError


@pytest.fixture(params=["directory", "gguf"])
def source(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> Path:
    """A source of either kind, the directory or file `place/tiny…`, which a test may move."""
    (tmp_path / "place").mkdir()
    if request.param == "gguf":
        from support.models.gguf_file import write_gguf  # late, as it may skip

        return write_gguf(tmp_path / "place" / "tiny.gguf")
    return make_checkpoint("llama", name="place/tiny")


@pytest.mark.parametrize("way", ["absolute", "dotted", "upwards", "link", "linked directory"])
def test_goes_on_however_the_source_is_spelt(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"link{source.suffix}").symlink_to(source)
    Path("linked").symlink_to("place")
    spelling = {
        "absolute": str(source),
        "dotted": f"./place/./{source.name}",
        "upwards": f"place/../place/{source.name}",
        "link": f"link{source.suffix}",
        "linked directory": f"linked/{source.name}",
    }[way]
    run_until(Path("place") / source.name, tmp_path / "out", 0.5)
    before = stamps(tmp_path / "out")
    assert before
    convert(spelling, tmp_path / "out")
    for blob, stamp in before.items():
        stat = (tmp_path / "out" / blob).stat()
        assert (stat.st_ino, stat.st_mtime_ns) == stamp, f"{blob} was converted again"
    convert(spelling, tmp_path / "whole")
    assert not differing(tmp_path / "whole", tmp_path / "out")


def test_a_source_that_was_moved_is_another(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_until(source, out, 0.5)
    moved = source.rename(tmp_path / source.name)
    said = (
        f"{partial_of(out)}: holds an unfinished conversion of another source, {source}, not of "
        f"{moved}; finish that one (move it back, if it was moved), remove the directory, or "
        "start over with --force"
    )
    with pytest.raises(TargetError, match=f"^{re.escape(said)}$"):
        convert(str(moved), out)
    moved.rename(source)
    before = stamps(out)
    convert(str(source), out)
    assert all((out / blob).stat().st_ino == inode for blob, (inode, _) in before.items())
