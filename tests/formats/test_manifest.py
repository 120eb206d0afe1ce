"""One defect at a time in `layerpack.json`: each is named, with the file that has it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pack import write_small_pack

from layerpack.formats import pack as packs
from layerpack.formats.digest import bytes_digest
from layerpack.formats.errors import PackError, PackVersionError
from layerpack.formats.manifest import MANIFEST_NAME, Manifest
from layerpack.formats.manifest_json import dump_manifest, parse_manifest
from layerpack.formats.nf4 import STATE
from layerpack.formats.pack import read_manifest

Document = dict[str, Any]
Damage = Callable[[Document], object]
UP = "model.layers.1.up.weight"
L1, HEAD = 2, 3
"""Places of layer 1 and of the head among the blobs."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_small_pack(tmp_path_factory.mktemp("small") / "pack")


@pytest.fixture
def document(small: Manifest) -> Document:
    fields: Document = json.loads(dump_manifest(small))
    return fields


def parse(document: Document) -> Manifest:
    return parse_manifest(signed(document), where="out/layerpack.json")


def signed(document: Document) -> bytes:
    """The document's bytes with the digest of themselves in them."""
    fields = {key: value for key, value in document.items() if key != "digest"}
    raw = json.dumps(fields, indent=1).encode() + b"\n"  # also what no writer would write
    first, rest = raw.split(b"\n", 1)
    return first + f'\n "digest": "{bytes_digest(raw)}",\n'.encode() + rest


def refused(document: Document) -> str:
    with pytest.raises(PackError) as caught:
        parse(document)
    text = str(caught.value)
    assert text.startswith("out/layerpack.json: ") and "\n" not in text
    return text


def blob(place: int, **fields: Any) -> Damage:
    return lambda document: document["blobs"][place].update(fields)


def find(document: Document, name: str) -> Document:
    (entry,) = (t for b in document["blobs"] for t in b["tensors"] if t["name"] == name)
    found: Document = entry
    return found


def tensor(name: str, /, **fields: Any) -> Damage:
    return lambda document: find(document, name).update(fields)


def state(**fields: Any) -> Damage:
    return lambda document: find(document, UP)["nf4"].update(fields)


def put(*path: str, value: Any) -> Damage:
    def damage(document: Document) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return damage


def shift(place: int, first: int, by: int, *, grow: bool = True) -> Damage:
    """Move tensors from number `first` on by some bytes, and the file's end with them."""

    def damage(document: Document) -> None:
        fields = document["blobs"][place]
        for entry in fields["tensors"][first:]:
            entry["offset_bytes"] += by
        if grow:
            fields["size_bytes"] += by

    return damage


def drop(place: int, name: str) -> Damage:
    """Take a tensor out and close the gap."""

    def damage(document: Document) -> None:
        fields = document["blobs"][place]
        at = [t["name"] for t in fields["tensors"]].index(name)
        length = fields["tensors"].pop(at)["length_bytes"]
        shift(place, at, -length)(document)

    return damage


def swap_blobs(document: Document) -> None:
    document["blobs"][1:3] = document["blobs"][2:0:-1]


def same_tensor_twice(document: Document) -> None:
    document["blobs"][HEAD]["tensors"][0]["name"] = "model.embed.weight"


def widen(name: str, extra_bytes: int) -> Damage:
    """One tensor grows, everything after it moves: its shape is wrong, the tiling is not."""

    def damage(document: Document) -> None:
        for place, fields in enumerate(document["blobs"]):
            for at, entry in enumerate(fields["tensors"]):
                if entry["name"] == name:
                    entry["length_bytes"] += extra_bytes
                    entry["shape"][0] += extra_bytes
                    shift(place, at + 1, extra_bytes)(document)

    return damage


DEFECTS: dict[str, tuple[Damage, str]] = {
    # the rules of the manifest as a whole
    "other format": (put("format", value="zip"), "not a layerpack manifest"),
    "version text": (put("format_version", value="1"), "format_version '1'"),
    "version zero": (put("format_version", value=0), "format_version 0"),
    "version true": (put("format_version", value=True), "format_version True"),
    "no producer": (lambda d: d.pop("producer"), "producer is missing"),
    "empty producer": (put("producer", value=""), "producer is missing or not valid"),
    "long text": (put("producer", value="x" * 4097), "producer is missing or not valid"),
    "no source": (lambda d: d.pop("source"), "source.kind is missing"),
    "source a list": (put("source", value=[]), "source.kind is missing"),
    "no source id": (put("source", "id", value=None), "source.id is missing"),
    "revision a number": (put("source", "revision", value=3), "source.revision"),
    "source file size": (
        lambda d: d["source"]["files"][0].update(size_bytes=-1),
        "source.files[0].size_bytes",
    ),
    "source file text": (lambda d: d["source"]["files"].append("x"), "source.files[1].name"),
    "no model": (lambda d: d.pop("model"), "model.architecture is missing"),
    "no layers": (put("model", "num_layers", value=0), "for 0 layers"),
    "model dtype": (put("model", "dtype", value="F8_E4M3"), "model dtype F8_E4M3"),
    "parameters 1.5": (put("model", "num_parameters", value=1.5), "model.num_parameters"),
    "too large": (put("model", "num_parameters", value=1 << 49), "model.num_parameters"),
    "no embedding": (put("model", "embedding", value="x"), "tensor x, named under model"),
    "no head": (put("model", "head", value="x"), "tensor x, named under model"),
    "head in a layer": (put("model", "head", value=UP), f"tensor {UP}, named under model"),
    "embedding elsewhere": (put("model", "embedding", value="lm_head.weight"), "is not in embed"),
    "int4": (put("quantization", "type", value="int4"), "quantization.type"),
    "odd blocks": (put("quantization", "block_size", value=63), "block size 63"),
    "other blocks": (put("quantization", "block_size", value=128), "is not quantised as"),
    "double of one": (put("quantization", "double_quant", value=1), "quantization.double_quant"),
    "flat": (put("quantization", "double_quant", value=False), "is not quantised as"),
    "nested blocks": (put("quantization", "nested_block_size", value=128), "nested_block_size"),
    "head not nf4": (put("quantization", "head", value=True), "quantization.head is true"),
    # the order of the blobs
    "no blobs": (put("blobs", value=[]), "0 blobs for 2 layers"),
    "blobs an object": (put("blobs", value={}), "blobs is missing or not valid"),
    "blob a text": (lambda d: d["blobs"].append("x"), "blobs[4].file"),
    "a layer too few": (lambda d: d["blobs"].pop(1), "3 blobs for 2 layers"),
    "layers swapped": (swap_blobs, "blobs[1] should be layer 0 but is layer 1"),
    "role unknown": (blob(1, role="expert"), "blobs[1].role"),
    "role a list": (blob(1, role=["layer"]), "blobs[1].role"),
    "head not last": (blob(HEAD, role="embedding"), "blobs[3] should be head but is embedding"),
    "layer true": (blob(1, layer=True), "blobs[1].layer"),
    "embedding numbered": (blob(0, layer=0), "blobs[0] should be embedding"),
    # one blob
    "parent directory": (blob(1, file="../layer.safetensors"), "'../layer.safetensors' is not a"),
    "absolute": (blob(1, file="/etc/layer.safetensors"), "'/etc/layer.safetensors' is not a"),
    "backslash": (blob(1, file="..\\a.safetensors"), "is not a plain .safetensors name"),
    "line end": (blob(1, file="a.safetensors\n"), "is not a plain .safetensors name"),
    "hidden file": (blob(1, file=".safetensors"), "is not a plain .safetensors name"),
    "other ending": (blob(1, file="layer.bin"), "is not a plain .safetensors name"),
    "file twice": (blob(1, file="head.safetensors"), "head.safetensors is listed twice"),
    "digest": (blob(1, digest="sha256:00"), "layer-000.safetensors: digest 'sha256:00'"),
    "digest upper": (blob(1, digest="xxh3_128:" + "A" * 32), "is not an xxh3_128 digest"),
    "no tensors": (blob(1, tensors=[]), "layer-000.safetensors lists no tensors"),
    "ends early": (
        lambda d: blob(1, size_bytes=d["blobs"][1]["size_bytes"] - 1)(d),
        "layer-000.safetensors: tensors end at byte 12392, outside its 12391 bytes",
    ),
    "far too short": (blob(1, size_bytes=0), "outside its 0 bytes"),
    "bytes after": (
        lambda d: blob(1, size_bytes=d["blobs"][1]["size_bytes"] + 9)(d),
        "layer-000.safetensors: 9 bytes after the last tensor",
    ),
    "data at 0": (shift(L1, 0, -4096), "layer-001.safetensors: data begin at byte 0"),
    "data off page": (shift(L1, 0, 8), "layer-001.safetensors: data begin at byte 4104"),
    # one tensor
    "tensor a number": (lambda d: d["blobs"][L1]["tensors"].append(7), "blobs[2].tensors[14].name"),
    "no offset": (lambda d: find(d, UP).pop("offset_bytes"), "tensors[0].offset_bytes"),
    "offset negative": (tensor(UP, offset_bytes=-4096), "tensors[0].offset_bytes"),
    "offset huge": (tensor(UP, offset_bytes=1 << 60), "tensors[0].offset_bytes"),
    "offset beyond": (shift(L1, 0, 1 << 40, grow=False), "outside its 12392 bytes"),
    "shape deep": (tensor(UP, shape=[1] * 9), "tensors[0].shape"),
    "shape negative": (tensor(UP, shape=[-1, -1]), "tensors[0].shape"),
    "dtype unknown": (tensor(UP, dtype="U4"), f"{UP} has dtype 'U4', which is not known"),
    "dtype not of packs": (tensor(UP, dtype="F8_E4M3"), "dtype 'F8_E4M3', which is not known"),
    "length": (tensor(UP, length_bytes=7), f"{UP} has 7 bytes, not its shape's"),
    "overlap": (
        shift(L1, 3, -64),
        f"layer-001.safetensors: {UP}.quant_map overlaps",
    ),
    "hole": (shift(L1, 3, 64), "hole before model.layers.1.up.weight.quant_map"),
    "same name twice": (same_tensor_twice, "tensor model.embed.weight is listed twice"),
    "not of its layer": (
        tensor("model.layers.1.norm.weight", name="model.layers.10.norm.weight"),
        "layer-001.safetensors: model.layers.10.norm.weight does not begin with model.layers.1.",
    ),
    "codes off page": (
        widen(UP + STATE, 8),
        "down.weight is misaligned",
    ),
    "plain misaligned": (
        widen("model.layers.1.down.weight" + STATE, 4),
        "model.layers.1.steps is misaligned (byte 12292)",
    ),
    "embedding nf4": (tensor("model.embed.weight", nf4={}), "nf4.shape"),
    "embedding flat": (tensor("model.embed.weight", shape=[21 * 48]), "is not a matrix of 16"),
    "embedding of integers": (tensor("model.embed.weight", dtype="I16"), "is not a matrix of 16"),
    "head flat": (tensor("lm_head.weight", shape=[21 * 48]), "lm_head.weight is not a matrix"),
    "head of integers": (tensor("lm_head.weight", dtype="I16"), "is not a matrix of 16 or 32"),
    # one quantised weight
    "state missing": (lambda d: find(d, UP).pop("nf4"), f"{UP}.nested_absmax belongs to no"),
    "state null": (tensor(UP, nf4=None), "tensors[0].nf4.shape"),
    "state blocks": (state(block_size=65), f"{UP} has an unknown block size"),
    "state dtype": (state(dtype="I8"), f"{UP} has an unknown block size or dtype"),
    "state offset": (state(nested_offset=1e39), "tensors[0].nf4.nested_offset"),
    "state offset text": (state(nested_offset="0.5"), "tensors[0].nf4.nested_offset"),
    "state without offset": (
        state(nested_offset=None),
        ".absmax is U8 [54], should be F32",
    ),
    "vector": (state(shape=[72 * 48]), f"{UP} is not a matrix"),
    "empty matrix": (state(shape=[0, 48]), f"{UP} is not a matrix"),
    "other shape": (state(shape=[72, 50]), f"{UP} is U8 [1728, 1], should be U8 [1800, 1]"),
    "codes flat": (tensor(UP, shape=[1728]), f"{UP} is U8 [1728], should be U8 [1728, 1]"),
    "codes signed": (tensor(UP, dtype="I8"), f"{UP} is I8 [1728, 1], should be U8"),
    "no absmax": (drop(L1, UP + ".absmax"), f"layer-001.safetensors: {UP}.absmax is missing"),
    "no map": (drop(L1, UP + ".quant_map"), f"{UP}.quant_map is missing"),
    "state part short": (
        widen(UP + STATE, -1122),
        "quant_state.bitsandbytes__nf4 has the wrong dtype or shape",
    ),
    "state part signed": (
        tensor(UP + STATE, dtype="I8"),
        "quant_state.bitsandbytes__nf4 has the wrong dtype or shape",
    ),
}


def test_the_undamaged_one_is_read_as_written(small: Manifest, document: Document) -> None:
    assert parse(document) == small
    document["features"] = []
    document["blobs"][0]["later"] = {"a key": "that a reader may ignore"}
    assert parse(document) == small
    del document["features"]
    assert parse(document) == small
    assert dump_manifest(small) == dump_manifest(parse_manifest(dump_manifest(small)))


@pytest.mark.parametrize("defect", DEFECTS)
def test_one_defect_is_named(defect: str, document: Document) -> None:
    damage, message = DEFECTS[defect]
    before = json.dumps(document)
    damage(document)
    assert json.dumps(document) != before
    assert message in refused(document)


def test_a_newer_format_says_so(document: Document) -> None:
    for fields in ({"format_version": 2}, {"features": ["sparse"]}, {"features": "sparse"}):
        with pytest.raises(PackVersionError) as caught:
            parse({**document, "blobs": "of another shape", **fields})
        assert "install a newer layerpack" in str(caught.value)
    with pytest.raises(PackVersionError) as caught:
        parse({**document, "features": ["x" * 10_000]})
    assert len(str(caught.value)) < 300


def test_a_long_list_of_problems_is_cut(document: Document) -> None:
    for fields in document["blobs"]:
        fields["digest"] = "none"
        fields["size_bytes"] += 1
    text = refused(document)
    assert text.count(";") == 3 and text.endswith("; and 5 more problems")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"format": "layerpack",', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "not a layerpack manifest"),
        (b"null", "not a layerpack manifest"),
        (b'{"format": "layerpack", "format": "layerpack"}', "duplicate key 'format'"),
        (b'{"format": NaN}', "NaN is not JSON"),
        (b'{"format": "\\ud800"}', "an escape that is no character"),
        (b'{"format":' + b"[" * 100_000, "nested too deeply"),
        (b'{"format_version": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_what_is_not_a_manifest(raw: bytes, message: str) -> None:
    with pytest.raises(PackError, match=MANIFEST_NAME) as caught:
        parse_manifest(raw)
    assert message in str(caught.value)


def test_directories_that_are_no_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(path: Path) -> str:
        with pytest.raises(PackError) as caught:
            read_manifest(path)
        return str(caught.value)

    assert "no such directory" in message(tmp_path / "nothing")
    assert "no layerpack.json in it" in message(tmp_path)
    (tmp_path / MANIFEST_NAME).mkdir()
    assert "not a file of at most" in message(tmp_path)
    monkeypatch.setattr(packs, "MAX_MANIFEST_BYTES", 100)
    write_small_pack(tmp_path / "pack")
    assert "pack/layerpack.json: not a file of at most 100 B" in message(tmp_path / "pack")


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:6]
    return [path] * bool(path) + [p for k, v in items for p in _paths(v, (*path, k))]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 1 << 14),
    st.floats(allow_nan=False),
    st.text(max_size=9),
    st.lists(st.integers(0, 99), max_size=3),
    st.just({}),
    st.sampled_from(["BF16", "F32", "U8", "layer", "head", "embed.safetensors", UP]),
)


@pytest.mark.parametrize("key", ["layers_path", "embedding", "head", "dtype"])
def test_an_error_is_one_line_whatever_is_in_a_name(key: str, small: Manifest) -> None:
    document = json.loads(dump_manifest(small))
    document["model"][key] = "mo\ndel\x1b[31m"
    with pytest.raises(PackError) as caught:
        parse(document)
    assert str(caught.value).isprintable()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(data: st.DataObject, small: Manifest) -> None:
    document = json.loads(dump_manifest(small))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(_paths(document)))
        put(*path, value=data.draw(VALUES))(document)
    try:
        manifest = parse(document)
    except PackError as error:
        assert "\n" not in str(error)
    else:
        assert parse_manifest(dump_manifest(manifest)) == manifest


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 20_000), st.integers(0, 9), st.binary(max_size=9)),
        min_size=1,
        max_size=3,
    )
)
def test_mutated_bytes_are_read_or_refused(
    small: Manifest, edits: list[tuple[int, int, bytes]]
) -> None:
    raw = dump_manifest(small)
    for position, removed, added in edits:
        raw = raw[: position % len(raw)] + added + raw[position % len(raw) + removed :]
    with contextlib.suppress(PackError):
        parse_manifest(raw)
