"""`layerpack.json` read as it was written, of a newer format, and where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.packs.manifest_damage import Document, parse, refused
from support.packs.small import write_small_pack

from layerpack.formats import pack as packs
from layerpack.formats.errors import PackError, PackVersionError
from layerpack.formats.manifest.document import dump_manifest, parse_manifest
from layerpack.formats.manifest.facts import MANIFEST_NAME, Manifest
from layerpack.formats.pack import read_manifest


def test_the_undamaged_one_is_read_as_written(small: Manifest, document: Document) -> None:
    assert parse(document) == small
    document["features"] = []
    document["blobs"][0]["later"] = {"a key": "that a reader may ignore"}
    assert parse(document) == small
    del document["features"]
    assert parse(document) == small
    assert dump_manifest(small) == dump_manifest(parse_manifest(dump_manifest(small)))


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
