"""Damage of every kind, at every byte: verify names the file, and nothing crashes on it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.packs.tiny import write_tiny_pack

from layerpack.formats.errors import LayerpackError, PackError
from layerpack.formats.manifest.document import dump_manifest, parse_manifest
from layerpack.formats.manifest.facts import MANIFEST_NAME, Blob, FileEntry
from layerpack.formats.pack import Pack
from layerpack.formats.read import open_reader
from layerpack.formats.verify import How, check_file, require_intact, verify_pack

PackOf = Callable[..., Path]
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
LAYER = "layer-000.safetensors"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny_pack(tmp_path / "tiny")
    return tmp_path / "tiny"


def found(path: Path) -> dict[str, How]:
    return {difference.file: difference.how for difference in verify_pack(path).differences}


def flips(raw: bytes) -> Iterator[tuple[int, int]]:
    """Each position with its byte changed, by another bit each time."""
    for position, byte in enumerate(raw):
        yield position, byte ^ 1 << position % 8


def damage(file: Path, chance: random.Random) -> bytes:
    """Change one random byte of `file`; what it was before."""
    raw = file.read_bytes()
    changed = bytearray(raw)
    changed[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    file.write_bytes(changed)
    return raw


def test_a_whole_pack_has_no_differences(tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = verify_pack(tiny, lambda *sizes: seen.append(sizes))
    assert not result.differences
    assert result.num_files == len(list(tiny.iterdir()))
    sizes = sum(file.stat().st_size for file in tiny.iterdir() if file.name != MANIFEST_NAME)
    assert result.checked_bytes == sizes
    assert seen[-1] == (sizes, sizes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    require_intact(tiny)
    assert not verify_pack(tiny, direct=False).differences


def test_every_file_that_differs_is_named_with_how(tiny: Path) -> None:
    (tiny / INDEX).unlink()
    (tiny / CONFIG).write_bytes(b"{ }\n")
    with open(tiny / "embed.safetensors", "ab") as file:
        file.write(b"x")
    header, content = tiny / "head.safetensors", tiny / LAYER
    header.write_bytes(header.read_bytes().replace(b"BF16", b"F16 ", 1))
    content.write_bytes(content.read_bytes()[:-1] + b"\x55")
    assert found(tiny) == {
        INDEX: How.MISSING,
        CONFIG: How.SIZE,
        "embed.safetensors": How.SIZE,
        "head.safetensors": How.HEADER,
        LAYER: How.DIGEST,
    }
    with pytest.raises(PackError, match=r"config\.json has 4 of 3 bytes; .* and 2 more files"):
        require_intact(tiny)


def test_each_byte_of_each_blob_and_small_file(tiny: Path) -> None:
    pack = Pack.open(tiny)
    reader = open_reader(tiny / LAYER, direct=False)
    entries: dict[str, Blob | FileEntry] = {blob.file: blob for blob in pack.manifest.blobs}
    entries |= {file.name: file for file in pack.manifest.files}
    assert entries.keys() | {MANIFEST_NAME} == {file.name for file in tiny.iterdir()}
    for name, entry in entries.items():
        raw = (tiny / name).read_bytes()
        with open(tiny / name, "r+b", buffering=0) as file:
            for position, byte in flips(raw):
                os.pwrite(file.fileno(), bytes([byte]), position)
                # What verify_pack calls for each file.
                difference = check_file(pack, entry, reader, lambda _: None)
                assert difference is not None and difference.file == name
                os.pwrite(file.fileno(), raw[position : position + 1], position)
        assert check_file(pack, entry, reader, lambda _: None) is None
    reader.close()


def test_each_byte_of_the_manifest(tiny: Path) -> None:
    raw = (tiny / MANIFEST_NAME).read_bytes()
    assert dump_manifest(parse_manifest(raw)) == raw
    for position, byte in flips(raw):
        with pytest.raises(PackError):
            parse_manifest(raw[:position] + bytes([byte]) + raw[position + 1 :])
    (tiny / MANIFEST_NAME).write_bytes(raw.replace(b'"tests"', b'"Tests"'))
    assert found(tiny) == {MANIFEST_NAME: How.MANIFEST}


def test_the_manifest_torn_or_written_in_another_way(tiny: Path) -> None:
    raw = (tiny / MANIFEST_NAME).read_bytes()
    for length in range(0, len(raw), 7):
        with pytest.raises(PackError):
            parse_manifest(raw[:length])
    for changed in (raw + b" ", raw.replace(b"\n ", b"\n  "), raw.replace(b"\n", b"\r\n")):
        with pytest.raises(PackError, match="its own digest"):
            parse_manifest(changed)


def test_a_state_that_the_manifest_contradicts(tiny: Path) -> None:
    manifest = parse_manifest((tiny / MANIFEST_NAME).read_bytes())
    embed, layer, head = manifest.blobs
    states = {name: replace(state, nested_offset=0.25) for name, state in layer.nf4.items()}
    changed = replace(manifest, blobs=(embed, replace(layer, nf4=states), head))
    (tiny / MANIFEST_NAME).write_bytes(dump_manifest(changed))
    assert found(tiny) == {LAYER: How.STATE}


def test_what_is_no_pack(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="no such directory"):
        verify_pack(tmp_path / "nothing")
    with pytest.raises(PackError, match=rf"^{tmp_path}: no {MANIFEST_NAME} in it, so not a pack"):
        verify_pack(tmp_path)


@pytest.mark.parametrize("name", ["a/b", "..", "a\\b", "a\nb", "\ud800", MANIFEST_NAME, CONFIG])
def test_file_names_that_lead_out_of_the_pack(tiny: Path, name: str) -> None:
    raw = (tiny / MANIFEST_NAME).read_bytes()
    with pytest.raises(PackError, match=r"not a plain name|listed twice|no character"):
        parse_manifest(raw.replace(f'"{INDEX}"'.encode(), json.dumps(name).encode()))


def test_random_damage_of_a_real_pack_is_found_and_crashes_nothing(
    pack_of: PackOf, tmp_path: Path
) -> None:
    from layerpack.runtime.model import Model
    from layerpack.runtime.open_options import OpenOptions
    from layerpack.runtime.tokenizer import load_tokenizer

    path = tmp_path / "pack"
    shutil.copytree(pack_of("llama"), path)
    assert not found(path)
    chance, opened = random.Random(5), 0
    files = sorted(path.iterdir())
    for number in range(120):
        file = files[number % len(files)]
        raw = damage(file, chance)
        assert file.name in found(path), file.name
        try:
            Pack.open(path)
            if chance.random() < 0.3:
                load_tokenizer(path)
                with Model.open(path, OpenOptions(device="cpu")):
                    opened += 1
        except LayerpackError:
            pass
        file.write_bytes(raw)
    assert not found(path)
    assert opened > 5
