"""What people have: a cache's folder, an address, shards without an index, pointers, adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hub.server import HubServer, Repo
from support.hub.source import REPO, turn_client_to
from support.models.tiny import make_sharded
from support.packs.comparing import differing

from layerpack.convert import ConvertOptions, convert
from layerpack.convert.forecast import forecast
from layerpack.convert.gguf.parts import all_parts, first_parts
from layerpack.convert.open_source import _repository, open_source
from layerpack.convert.output.remaining import Remaining
from layerpack.formats import lfs
from layerpack.formats.errors import SourceError
from layerpack.formats.pack import Pack

INDEX = "model.safetensors.index.json"
POINTER = lfs.START + b"v1\noid sha256:" + b"a" * 64 + b"\nsize 9085657\n"
COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_sharded(tmp_path / "sharded")


@pytest.fixture
def wanted(sharded: Path, tmp_path: Path) -> Path:
    """The pack that it makes as it is."""
    convert(str(sharded), tmp_path / "wanted")
    return tmp_path / "wanted"


def notes_of(source: Path, out: Path) -> tuple[str, ...]:
    """What a conversion tells beforehand; `inspect` tells the same."""
    told: list[Remaining] = []
    convert(str(source), out, announce=told.append)
    assert forecast(str(source)).notes == told[0].notes
    return told[0].notes


def cached(sharded: Path, folder: Path, *commits: str, main: str | None) -> Path:
    for commit in commits:
        shutil.copytree(sharded, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    if main:
        (folder / "refs" / "main").write_text(main)
    return folder


def test_a_folder_of_the_hubs_cache(sharded: Path, wanted: Path, tmp_path: Path) -> None:
    folder = cached(sharded, tmp_path / "models--tiny--org", *COMMITS, main=COMMITS[1])
    convert(str(folder), tmp_path / "out")
    assert differing(wanted, tmp_path / "out") == ["layerpack.json"]  # another place
    with open_source(str(folder), ConvertOptions(), scratch=tmp_path) as source:
        assert source.config_dir.name == COMMITS[1]
    with open_source(str(folder), ConvertOptions(revision=COMMITS[0]), scratch=tmp_path) as source:
        assert source.config_dir.name == COMMITS[0]


def test_a_cache_without_main_names_its_commits(sharded: Path, tmp_path: Path) -> None:
    folder = cached(sharded, tmp_path / "models--a--b", *COMMITS, main=None)
    with pytest.raises(SourceError, match=f"its commits are {COMMITS[0]}, {COMMITS[1]}: name one"):
        open_source(str(folder), ConvertOptions(), scratch=tmp_path)
    shutil.rmtree(folder / "snapshots" / COMMITS[1])
    with open_source(str(folder), ConvertOptions(), scratch=tmp_path) as source:
        assert source.config_dir.name == COMMITS[0]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Qwen/Qwen3-8B", ("Qwen/Qwen3-8B", None, "")),
        ("https://huggingface.co/Qwen/Qwen3-8B", ("Qwen/Qwen3-8B", None, "")),
        ("https://huggingface.co/Qwen/Qwen3-8B/", ("Qwen/Qwen3-8B", None, "")),
        ("http://localhost:8000/Qwen/Qwen3-8B/tree/v2", ("Qwen/Qwen3-8B", "v2", "")),
        (
            "https://hf.co/a/b/blob/refs%2Fpr%2F3/config.json?x=1#L3",
            ("a/b", "refs/pr/3", "config.json"),
        ),
        (
            "https://huggingface.co/a/b/resolve/main/model.safetensors",
            ("a/b", "main", "model.safetensors"),
        ),
    ],
)
def test_names_and_addresses(name: str, found: tuple[str, str | None, str]) -> None:
    assert _repository(name) == found


@pytest.mark.parametrize(
    "name",
    [
        "https://huggingface.co/Qwen",
        "https://huggingface.co/datasets/a/b",
        "https://huggingface.co/a/b/discussions/3",
        "https://",
        "ftp://a/b",
        "a/b/c",
    ],
)
def test_what_is_none(name: str) -> None:
    with pytest.raises(SourceError, match=r"not the address of a model|no such directory"):
        _repository(name)


def test_an_address_is_the_repository(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = HubServer()
    with server.running():
        server.repos[REPO] = Repo(directory=sharded)
        turn_client_to(server, monkeypatch, tmp_path / "cache")
        for name in (REPO, f"{server.url}/{REPO}", f"{server.url}/{REPO}/tree/main"):
            with open_source(name, ConvertOptions(), scratch=tmp_path / "scratch") as source:
                assert (source.kind, source.id) == ("hub", REPO)
        with pytest.raises(SourceError, match="names main, and --revision other"):
            open_source(
                f"{server.url}/{REPO}/tree/main",
                ConvertOptions(revision="other"),
                scratch=tmp_path,
            )


def test_shards_without_an_index_are_all_read(sharded: Path, wanted: Path, tmp_path: Path) -> None:
    (sharded / INDEX).unlink()
    convert(str(sharded), tmp_path / "out")
    assert differing(wanted, tmp_path / "out") == []


def test_a_gap_in_their_numbers_is_named(sharded: Path, tmp_path: Path) -> None:
    (sharded / INDEX).unlink()
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(SourceError, match=rf"{gone.name} is missing"):
        convert(str(sharded), tmp_path / "out")


UP = "model.layers.1.mlp.up_proj.weight"


def test_the_index_decides_between_copies(sharded: Path, wanted: Path, tmp_path: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    right = load_file(sharded / index["weight_map"][UP])[UP]
    save_file({UP: torch.ones_like(right)}, sharded / "overlay.safetensors")
    convert(str(sharded), tmp_path / "first")  # a file that no index names is not read
    assert differing(wanted, tmp_path / "first") == []
    index["weight_map"][UP] = "overlay.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    convert(str(sharded), tmp_path / "second")
    changed = set(differing(wanted, tmp_path / "second"))
    assert changed == {"layer-001.safetensors", "layerpack.json"}
    (sharded / INDEX).unlink()
    (sharded / "overlay.safetensors").rename(sharded / "model-overlay.safetensors")
    with pytest.raises(SourceError, match=rf"tensor {UP} is in .* and in .*, and no {INDEX} says"):
        convert(str(sharded), tmp_path / "third")


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_is_called_one(sharded: Path, tmp_path: Path, with_config: bool) -> None:
    for file in sharded.glob("model*"):
        file.unlink()
    if not with_config:
        (sharded / "config.json").unlink()
    (sharded / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, sharded / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="a LoRA adapter, not a model; merge it"):
        convert(str(sharded), tmp_path / "out")


def test_an_adapter_beside_a_model_is_left_alone(
    sharded: Path, wanted: Path, tmp_path: Path
) -> None:
    (sharded / INDEX).unlink()
    save_file({"a": torch.zeros(2)}, sharded / "adapter_model.safetensors")
    convert(str(sharded), tmp_path / "out")
    assert differing(wanted, tmp_path / "out") == []


def test_pointers_of_git_lfs_are_called_by_name(
    sharded: Path, wanted: Path, tmp_path: Path
) -> None:
    (sharded / "tokenizer.json").write_bytes(POINTER)
    notes = notes_of(sharded, tmp_path / "out")
    assert any(f"tokenizer.json is left out: {lfs.REMEDY}" in note for note in notes)
    assert any("no tokenizer that transformers can load" in note for note in notes)
    for file in (next(sharded.glob("*.safetensors")), wanted / "layer-001.safetensors"):
        file.write_bytes(POINTER)
    with pytest.raises(SourceError, match="only a git-lfs pointer"):
        convert(str(sharded), tmp_path / "other")
    with pytest.raises(Exception, match=r"layer-001.safetensors: only a git-lfs pointer"):
        Pack.open(wanted)
    (tmp_path / "m.gguf").write_bytes(POINTER)
    with pytest.raises(SourceError, match="only a git-lfs pointer"):
        convert(str(tmp_path / "m.gguf"), tmp_path / "other")


def _no_tokenizer(source: Path) -> None:
    for file in source.glob("*token*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_tokenizer, "there is no tokenizer that transformers can load"),
        (lambda s: (s / "tokenizer.json").write_text("{"), "there is no tokenizer that"),
        (
            lambda s: (s / "generation_config.json").write_text("["),
            "generation_config.json is left out: it is not usable",
        ),
        (
            lambda s: (s / "generation_config.json").write_text("[]"),
            "generation_config.json is left out: it is not a JSON object",
        ),
    ],
)
def test_small_files_that_cannot_be_used_are_told(
    sharded: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(sharded)
    (note,) = notes_of(sharded, tmp_path / "out")
    assert said in note


def test_byte_order_marks_are_taken_off(sharded: Path, wanted: Path, tmp_path: Path) -> None:
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (sharded / name).write_bytes(b"\xef\xbb\xbf" + (sharded / name).read_bytes())
    assert notes_of(sharded, tmp_path / "out") == ()
    assert differing(wanted, tmp_path / "out") == []


def test_leftovers_of_training_in_16_bits_are_told(
    sharded: Path, wanted: Path, tmp_path: Path
) -> None:
    config = json.loads((sharded / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (sharded / "config.json").write_text(json.dumps(config))
    (note,) = notes_of(sharded, tmp_path / "out")
    assert "config.json speaks of bitsandbytes, but the weights are not quantised yet" in note
    assert differing(wanted, tmp_path / "out") == []


def test_tensors_without_a_place_are_skipped_on_demand(
    sharded: Path, wanted: Path, tmp_path: Path
) -> None:
    path = next(sharded.glob("*.safetensors"))
    tensors = load_file(path)
    extra = {f"model.layers.{n}.self_attn.k_scale": torch.ones(1) for n in (0, 1)}
    save_file(tensors | extra, path)
    with pytest.raises(SourceError, match=r"and 1 more; .* --skip 'model.layers.\*.self_attn.k_s"):
        convert(str(sharded), tmp_path / "out")
    told: list[Remaining] = []
    options = ConvertOptions(skip=("*.k_scale", "nothing"))
    convert(str(sharded), tmp_path / "out", options, announce=told.append)
    assert told[0].notes == (f"2 tensors are left out for --skip: {min(extra)} …",)
    assert differing(wanted, tmp_path / "out") == ["layerpack.json"]
    with pytest.raises(SourceError, match="needs the tensor"):
        (sharded / INDEX).unlink()
        tensors.pop(next(iter(tensors)))
        save_file(tensors, path)
        convert(str(sharded), tmp_path / "other", ConvertOptions(skip=("*",)))


def test_a_value_beyond_the_models_type_is_no_damage(sharded: Path, tmp_path: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    for name in (UP, "model.norm.weight"):
        index = json.loads((sharded / INDEX).read_text())["weight_map"]
        tensors = load_file(sharded / index[name])
        before = tensors[name].clone()
        tensors[name].view(-1)[3] = 2.0**20
        save_file(tensors, sharded / index[name])
        with pytest.raises(SourceError, match=rf"{name} has values up to 1.05e\+06, beyond F16"):
            convert(str(sharded), tmp_path / "out", ConvertOptions(force=True))
        save_file(tensors | {name: before}, sharded / index[name])


def test_parts_of_gguf_models(tmp_path: Path) -> None:
    names = ["b-00002-of-00002.gguf", "b-00001-of-00002.gguf", "a.gguf", "c-00002-of-00002.gguf"]
    assert first_parts(names) == ["a.gguf", "b-00001-of-00002.gguf", "c-00002-of-00002.gguf"]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in all_parts(tmp_path / names[0])] == [names[1], names[0]]
    assert all_parts(tmp_path / "a.gguf") == [tmp_path / "a.gguf"]
    with pytest.raises(SourceError, match=r"c-00001-of-00002.gguf: missing"):
        all_parts(tmp_path / names[3])
    with pytest.raises(SourceError, match=r"holds 3 GGUF models; name one: a.gguf, b-00001"):
        open_source(str(tmp_path), ConvertOptions(), scratch=tmp_path)
