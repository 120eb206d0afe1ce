"""Coverage-guided fuzzing of every parser that reads what nobody vouches for.

    python tests/fuzz/fuzz_parsers.py -max_total_time=600

Needs the package atheris, which the test suite does not. Options are libFuzzer's; a directory given
among them keeps what was found, else the seeds go to a temporary one. The first byte of an input
chooses the parser. A parser reads its input or raises its own error; anything else is a finding.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris  # type: ignore[import-not-found, import-untyped]

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["layerpack", "json"]):
    from support.packs.small import write_small_pack

    from layerpack.convert.output import journal
    from layerpack.convert.output.journal import read_journal
    from layerpack.convert.output.outline import parse_outline
    from layerpack.convert.source.index import INDEX_NAME, which_weights
    from layerpack.formats.blob import nf4
    from layerpack.formats.blob.header import parse_header, read_header
    from layerpack.formats.digest import bytes_digest
    from layerpack.formats.errors import LayerpackError
    from layerpack.formats.manifest.document import dump_manifest, parse_manifest
    from layerpack.formats.manifest.facts import MANIFEST_NAME
    from layerpack.formats.summary import fold_layers, pass_bytes, summarise_blobs

_FOLDER = Path(tempfile.mkdtemp(prefix="layerpack-fuzz-"))
_FILE = _FOLDER / "input"


def _manifest(raw: bytes) -> None:
    manifest = parse_manifest(raw)
    assert parse_manifest(dump_manifest(manifest)) == manifest
    fold_layers(summarise_blobs(manifest.blobs))
    pass_bytes(manifest)


def _header(raw: bytes) -> None:
    _FILE.write_bytes(raw)
    entries = read_header(_FILE)
    assert parse_header(raw, file_bytes=len(raw), where="") == entries
    assert sum(entry.length_bytes for entry in entries) <= len(raw)


def _state(raw: bytes) -> None:
    state = nf4.decode_state(raw, where="")
    assert nf4.decode_state(nf4.encode_state(state, 1000), where="") == state


def _index(raw: bytes) -> None:
    for file in which_weights([INDEX_NAME], lambda: raw, where="").files:
        assert "/" not in file and file.endswith(".safetensors")


def _journal(raw: bytes) -> None:
    _FILE.write_bytes(raw)
    parse_outline(read_journal(_FILE).about)


def _signed_journal(raw: bytes) -> None:
    """Each line with the digest that it should have: what lies behind the digest's check."""
    lines = [f"{bytes_digest(line)} ".encode() + line for line in raw.split(b"\n")]
    _journal(b"\n".join(lines))


_PARSERS: tuple[Callable[[bytes], None], ...] = (
    _manifest,
    _header,
    _state,
    _index,
    _journal,
    _signed_journal,
)


def _run(data: bytes) -> None:
    if data:
        with contextlib.suppress(LayerpackError):
            _PARSERS[data[0] % len(_PARSERS)](data[1:])


def _mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half the time bytes, as libFuzzer does; else one value inside the JSON."""
    rng = random.Random(seed)
    mutated = None if rng.random() < 0.5 else _mutate_value(data, rng)
    return (mutated or bytes(atheris.Mutate(data, max_size)))[:max_size]


def _mutate_value(data: bytes, rng: random.Random) -> bytes | None:
    """The input with one JSON value changed; None where there is no JSON to change."""
    is_header = len(data) > 9 and _PARSERS[data[0] % len(_PARSERS)] is _header
    begin, end = 1, len(data)
    if is_header:
        begin, end = 9, 9 + int.from_bytes(data[1:9], "little")
    try:
        value = json.loads(data[begin:end])
        places = list(_places(value))
        if not places:
            return None
        (holder, key), (other, other_key) = rng.choice(places), rng.choice(places)
        constants: list[Any] = [None, True, -1, 0, 1 << 50, 1e999, "", [], {}]
        holder[key] = rng.choice([*constants, other[other_key]])
        text = json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None
    head = data[:1] + (struct.pack("<Q", len(text)) if is_header else b"")
    return head + text + data[end:]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of each value inside `value`."""
    if not isinstance(value, dict | list):
        return
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        yield from _places(inner)


def _seeds(folder: Path) -> None:
    pack = _FOLDER / "pack"
    for number, options in enumerate(({}, {"double_quant": False, "tied": True})):
        write_small_pack(pack, num_layers=1, **options)  # type: ignore[arg-type]
        fields = json.loads((pack / MANIFEST_NAME).read_bytes())
        (folder / f"manifest{number}").write_bytes(b"\0" + json.dumps(fields).encode())
        raw = (pack / "layer-000.safetensors").read_bytes()
        (folder / f"header{number}").write_bytes(b"\1" + raw)
        state = nf4.Nf4State(shape=(2, 64), block_size=64, dtype="BF16", nested_offset=0.5)
        (folder / f"state{number}").write_bytes(b"\2" + nf4.encode_state(state, 320))
    index = {"weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}
    (folder / "index").write_bytes(b"\3" + json.dumps(index).encode())
    about = {"kind": "hub", "id": "a/b", "revision": None, "files": {"a": 1}, "blobs": {"b": 2}}
    states = {"a.weight": [[2, 64], 64, "BF16", 0.5]}
    lines: list[dict[str, Any]] = [
        {"run": "r", "about": {**about, "architecture": "A"}},
        {"run": "r", "source": "a", "digest": "sha256:00"},
        {"run": "r", "blob": "b", "digest": "xxh3_128:" + "0" * 32, "states": states},
    ]
    (folder / "journal").write_bytes(b"\4" + b"".join(map(journal._line, lines)))
    for number, line in enumerate(lines):
        (folder / f"line{number}").write_bytes(b"\5" + json.dumps(line).encode())


if __name__ == "__main__":
    corpora = [argument for argument in sys.argv[1:] if Path(argument).is_dir()]
    if not corpora:
        corpora = [str(_FOLDER / "corpus")]
        Path(corpora[0]).mkdir()
        sys.argv.append(corpora[0])
    _seeds(Path(corpora[0]))
    atheris.Setup([*sys.argv, "-max_len=30000"], _run, custom_mutator=_mutate)
    atheris.Fuzz()
