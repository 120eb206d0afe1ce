"""Source files are fetched once, in order, few at a time, and let go after their last use."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packs.comparing import differing
from transformers import AutoModelForCausalLM

from layerpack.convert import convert
from layerpack.convert.options import ConvertOptions
from layerpack.convert.source.directory import DirectorySource
from layerpack.formats.errors import HubError
from layerpack.formats.pack import Pack


class Watched(DirectorySource):
    """A directory that notes what is asked of it, and can fail like a download."""

    def __init__(self, path: Path, *, held: int, fail_at: int | None = None) -> None:
        super().__init__(path)
        self.max_held_files = held
        self.fetched: list[str] = []
        self.held: set[str] = set()
        self.most_held = 0
        self._fail_at = fail_at
        self._lock = threading.Lock()

    def fetch(self, file: str, report: Callable[[int], None]) -> None:
        if len(self.fetched) == self._fail_at:
            raise HubError("the line dropped")
        with self._lock:
            self.fetched.append(file)
            self.held.add(file)
            self.most_held = max(self.most_held, len(self.held))

    def read(self, name: str, rows: tuple[int, int] | None = None, *, pin: bool = False) -> Any:
        assert self.tensors[name].file in self.held
        return super().read(name, rows, pin=pin)

    def release(self, file: str) -> None:
        with self._lock:
            self.held.remove(file)
        super().release(file)


def convert_watched(
    monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, **settings: Any
) -> Watched:
    watched = Watched(source, **settings)
    monkeypatch.setattr("layerpack.convert.api.open_source", lambda *_, **__: watched)
    convert(str(source), out, ConvertOptions())
    return watched


@pytest.mark.parametrize("held", [1, 2, 3])
def test_few_files_are_held(
    make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    source = make_checkpoint("llama", num_hidden_layers=8, max_shard_size="150KB")
    watched = convert_watched(monkeypatch, source, tmp_path / "out", held=held)
    assert sorted(watched.fetched) == [file.name for file in watched.files]
    assert not watched.held
    assert len(watched.files) > 8
    assert watched.most_held <= max(held, 3)  # one blob can lie in up to three files here


def test_a_dropped_line_keeps_what_is_done_and_fetches_the_rest(
    make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint("llama", num_hidden_layers=8, max_shard_size="150KB")
    convert(str(source), tmp_path / "whole")
    with pytest.raises(HubError, match="dropped"):
        convert_watched(monkeypatch, source, tmp_path / "out", held=2, fail_at=6)
    assert not [t for t in threading.enumerate() if t.name.startswith("layerpack-")]
    again = convert_watched(monkeypatch, source, tmp_path / "out", held=2)
    assert len(again.fetched) < len(again.files)
    assert not differing(tmp_path / "whole", tmp_path / "out")


def test_one_file_goes_before_the_index_of_former_shards_as_in_transformers(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    source = make_checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
    model.save_pretrained(source)
    assert (source / "model.safetensors.index.json").is_file()
    convert(str(source), tmp_path / "out")
    model.save_pretrained(tmp_path / "anew")
    convert(str(tmp_path / "anew"), tmp_path / "wanted")
    assert differing(tmp_path / "wanted", tmp_path / "out") == ["layerpack.json"]


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_names_that_no_manifest_can_hold(make_checkpoint: Any, tmp_path: Path) -> None:
    source = make_checkpoint("llama", max_shard_size="1GB")
    os.rename(source / "model.safetensors", os.fsencode(source) + b"/m\xff.safetensors")
    (source / "LICENSE").write_text("to be copied")
    for name in (b"LICENSE\xff", b"NOTICE\n", "LICENSE\u3000".encode()):
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_text("left out")
    convert(str(source), tmp_path / "out")
    manifest = Pack.open(tmp_path / "out").manifest
    assert [file.name for file in manifest.source.files] == ["m\ufffd.safetensors"]
    assert [file.name for file in manifest.files if file.name.isupper()] == ["LICENSE"]
    assert not list((tmp_path / "out").glob("NOTICE*"))
