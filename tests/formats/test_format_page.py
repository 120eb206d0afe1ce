"""docs/format.md against the code: its example, its tables, and a reader made from it alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file
from support.models.tiny import make_checkpoint
from support.packs import mini_reader
from support.packs.format_example import NORM, WEIGHT, example_weight, write_example

from layerpack.convert import ConvertOptions, convert
from layerpack.convert.nf4.double_quant import nested_map
from layerpack.formats.blob import nf4
from layerpack.formats.blob.header import header_bytes
from layerpack.formats.manifest.rules import STORED_DTYPES

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
HEX_LINE = re.compile(r"^([0-9a-f]{8}): ((?:[0-9a-f]{2} )+)", re.MULTILINE)


def decoded_by_bitsandbytes(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight as bitsandbytes has it, seen as one row: its CPU kernel is wrong for some."""
    parts = {k: v for k, v in tensors.items() if k.startswith(name + ".")}
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    state.shape = torch.Size((1, state.shape.numel()))
    weight: torch.Tensor = dequantize_4bit(tensors[name], state)
    return weight.view(-1)


@pytest.mark.parametrize(
    ("name", "options", "overrides"),
    [
        ("qwen2", {}, {}),
        ("llama-odd", {}, {}),
        ("llama-odd", {"double_quant": False, "block_size": 32}, {}),
        ("llama", {"nf4_head": True, "block_size": 128}, {"dtype": "float16"}),
    ],
)
def test_a_reader_made_from_the_page_decodes_as_bitsandbytes(
    name: str, options: dict[str, Any], overrides: dict[str, Any], tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", name, num_hidden_layers=1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | overrides))
    pack = tmp_path / "pack"
    convert(str(source), pack, ConvertOptions(**options))
    compared = 0
    for blob in mini_reader.read_manifest(pack)["blobs"]:
        raw = mini_reader.read_blob(pack, blob)
        tensors = load_file(pack / blob["file"])
        for tensor in blob["tensors"]:
            if "nf4" in tensor:
                theirs = decoded_by_bitsandbytes(tensors, tensor["name"])
                ours = mini_reader.decode(raw, blob, tensor["name"])
                assert ours == theirs.view(torch.uint8).numpy().tobytes(), tensor["name"]
                compared += 1
    assert compared == (8 if options.get("nf4_head") else 7)


def test_the_example_is_what_the_writer_writes(tmp_path: Path) -> None:
    path = tmp_path / "example.safetensors"
    layout, state = write_example(path)
    raw = path.read_bytes()
    lines = HEX_LINE.findall(PAGE)
    assert len(lines) == 19
    for position, digits in lines:
        shown = bytes.fromhex(digits)
        assert raw[int(position, 16) :][: len(shown)] == shown, position
    assert f"{len(raw)} bytes" in PAGE
    for entry in layout.tensors:
        short = entry.name.removeprefix("model.layers.0.")
        row = (
            f"| `{short}` | {entry.dtype} | {list(entry.shape)} "
            f"| {entry.offset_bytes} | {entry.length_bytes} |"
        )
        assert row in PAGE
    (shown_entry,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (weight,) = (entry for entry in layout.tensors if entry.name == WEIGHT)
    fields = json.loads(shown_entry)
    assert fields.pop("nf4") == {
        "shape": list(state.shape),
        "dtype": state.dtype,
        "block_size": state.block_size,
        "nested_offset": state.nested_offset,
    }
    assert fields == {name: _plain(getattr(weight, name)) for name in fields}
    theirs = decoded_by_bitsandbytes(load_file(path), WEIGHT).view(2, 64)
    assert theirs[1, :2].view(torch.int16).tolist() == [0x3E81, 0xBE08 - 0x10000]
    assert (theirs[0] - example_weight()[0]).abs().max() < 0.16
    assert load_file(path)[NORM].tolist() == [1.0, 2.0]


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_numbers_on_the_page() -> None:
    for code, value in enumerate(nf4.NF4_CODES):
        assert f"| {code} | {value!r} | " in PAGE
    assert ", ".join(map(str, nf4.BLOCK_SIZES[:-1])) + " or 4096" in PAGE
    digest = hashlib.sha256(nested_map().numpy().tobytes()).hexdigest()
    assert digest in PAGE
    line = next(line for line in PAGE.splitlines() if line.startswith("Element types"))
    assert set(re.findall(r"\b([A-Z]+\d*) \d", line)) - {"IEEE"} == set(STORED_DTYPES)


def test_the_header_takes_the_room_that_the_page_says(tmp_path: Path) -> None:
    layout, _ = write_example(tmp_path / "example.safetensors")
    room = 8 + 32
    for entry in layout.tensors:
        shape = json.dumps(list(entry.shape), separators=(",", ":"))
        room += len(json.dumps(entry.name)) + len(shape) + 49 + 40
    assert header_bytes(layout.tensors) == -(-room // 4096) * 4096


def test_every_key_of_a_manifest_is_on_the_page(pack_of: Callable[..., Path]) -> None:
    document = json.loads((pack_of("qwen2") / "layerpack.json").read_text())

    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    missing = {key for key in keys(document) if f"`{key}`" not in PAGE}
    assert not missing
