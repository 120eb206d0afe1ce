"""GGUF files as sources, against transformers' own GGUF loading."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.gguf_file import HIDDEN, KV_HEADS, TEMPLATE, open_gguf, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from layerpack.convert.api import convert
from layerpack.convert.gguf import source as gguf_source
from layerpack.formats.errors import SourceError
from layerpack.formats.pack import Pack

gguf = pytest.importorskip("gguf")


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    )


@pytest.mark.parametrize(
    ("architecture", "tied", "kind"),
    [
        ("llama", True, "Q8_0"),
        ("llama", False, "Q4_1"),
        ("llama", False, "F16"),
        ("qwen2", False, "Q5_0"),
        ("qwen2", True, "BF16"),
    ],
)
def test_weights_equal_what_transformers_loads(
    tmp_path: Path, architecture: str, tied: bool, kind: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture=architecture, tied=tied, kind=kind)
    wanted = loaded(path).state_dict()
    if tied:
        wanted.pop("lm_head.weight")
    with open_gguf(path) as source:
        assert set(source.tensors) == set(wanted)
        for name, tensor in source.tensors.items():
            assert tensor.shape == tuple(wanted[name].shape)
            whole = source.read(name)
            assert whole.dtype == torch.bfloat16
            assert torch.equal(whole, wanted[name]), name
            rows = source.read(name, (3, 11))
            assert rows.is_contiguous()
            assert torch.equal(rows, wanted[name][3:11])


def test_conversion_equals_that_of_the_same_weights_in_a_directory(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tied=False)
    model = loaded(path)
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    del plain.config.quantization_config
    plain.save_pretrained(tmp_path / "directory")
    convert(str(tmp_path / "directory"), tmp_path / "wanted")
    manifest = convert(str(path), tmp_path / "found")
    assert manifest.source.kind == "gguf"
    for blob in manifest.blobs:
        found, wanted = tmp_path / "found" / blob.file, tmp_path / "wanted" / blob.file
        assert found.read_bytes() == wanted.read_bytes()
    assert (tmp_path / "found" / "chat_template.jinja").read_text() == TEMPLATE


def test_large_tensors_read_in_pieces_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    with open_gguf(path) as source:
        whole = source.read("model.embed_tokens.weight")
        monkeypatch.setattr(gguf_source, "_PIECE_ELEMENTS", 7 * HIDDEN)
        assert torch.equal(source.read("model.embed_tokens.weight"), whole)


def test_config_tokenizer_and_generation_settings_are_a_checkpoints(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "another model\'s"}')
    with open_gguf(path) as source:
        config = AutoConfig.from_pretrained(source.config_dir)
        fields = json.loads((source.config_dir / "config.json").read_text())
        assert "quantization_config" not in fields
        assert str(tmp_path) not in json.dumps(fields)
        assert fields["architectures"] == ["LlamaForCausalLM"]
        assert (config.hidden_size, config.num_key_value_heads) == (HIDDEN, KV_HEADS)
        assert config.tie_word_embeddings
        settings = json.loads((source.config_dir / "generation_config.json").read_text())
        assert settings == {"bos_token_id": 258, "eos_token_id": 259, "pad_token_id": 259}
        tokenizer = AutoTokenizer.from_pretrained(source.config_dir)
        assert tokenizer.eos_token == "</s>"
        assert tokenizer.bos_token == "<s>"
        assert tokenizer.decode(tokenizer("abc abba").input_ids) == "abc abba"
        message = [{"role": "user", "content": "hello"}]
        assert tokenizer.apply_chat_template(message, tokenize=False) == "hello"
        kept = source.config_dir
    assert not kept.exists()


def test_config_files_are_the_same_each_time(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    contents = []
    for _ in range(2):
        with open_gguf(path) as source:
            contents.append({f.name: f.read_bytes() for f in source.config_dir.iterdir()})
    assert contents[0] == contents[1]


def test_a_file_is_parsed_once_and_the_package_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, parsed = write_gguf(tmp_path / "m.gguf"), []

    class Counting(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        def __init__(self, *arguments: Any) -> None:
            parsed.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    name_map = gguf.get_tensor_name_map
    (tmp_path / "damaged.gguf").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SourceError):
        open_gguf(tmp_path / "damaged.gguf")
    parsed.clear()
    for count in (1, 2):
        open_gguf(path).__exit__(None, None, None)
        assert len(parsed) == count
    assert gguf.GGUFReader is Counting and gguf.get_tensor_name_map is name_map


def test_facts_change_with_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    with open_gguf(path) as source:
        (facts,) = source.files
        assert (facts.name, facts.file_bytes) == ("m.gguf", path.stat().st_size)
        assert source.digest("m.gguf").startswith("xxh3_128:")
        assert (source.kind, source.id, source.scratch_bytes) == ("gguf", str(path), 0)


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    damaged = tmp_path / "d.gguf"
    for content in (b"", b"GGUF", whole[:100], whole[:5000], whole[:-5000], b"x" + whole[1:]):
        damaged.write_bytes(content)
        with pytest.raises(SourceError) as caught:
            open_gguf(damaged)
        assert str(damaged) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_truncation_while_reading_is_an_error(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    with open_gguf(path) as source:
        path.write_bytes(path.read_bytes()[:-40000])
        with pytest.raises(SourceError, match=r"truncated while it was read"):
            for name in source.tensors:
                source.read(name)


def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture="wavtokenizer-dec")
    with pytest.raises(SourceError, match="wavtokenizer"):
        open_gguf(path)


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(SourceError, match=r"pip install layerpack\[gguf\]"):
        open_gguf(path)


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
@pytest.mark.parametrize("name", ["two words.gguf", "li\nnes.gguf", os.fsdecode(b"m\xff.gguf")])
def test_any_name_of_a_file_will_do(tmp_path: Path, name: str) -> None:
    path = write_gguf(tmp_path / "m.gguf").rename(tmp_path / name)
    (listed,) = convert(str(path), tmp_path / "out").source.files
    assert listed.name == os.fsencode(name).decode("utf-8", "replace")
    assert Pack.open(tmp_path / "out").manifest.source.files == (listed,)
