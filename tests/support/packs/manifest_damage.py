"""Ways to damage the manifest of small_pack in one place, and to read what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from layerpack.formats.digest import bytes_digest
from layerpack.formats.errors import PackError
from layerpack.formats.manifest.document import parse_manifest
from layerpack.formats.manifest.facts import Manifest

Document = dict[str, Any]
Damage = Callable[[Document], object]
UP = "model.layers.1.up.weight"
L1, HEAD = 2, 3
"""Places of layer 1 and of the head among the blobs."""


def parse(document: Document) -> Manifest:
    """What the document says, once it is signed."""
    return parse_manifest(signed(document), where="out/layerpack.json")


def signed(document: Document) -> bytes:
    """The document's bytes with the digest of themselves in them."""
    fields = {key: value for key, value in document.items() if key != "digest"}
    raw = json.dumps(fields, indent=1).encode() + b"\n"  # also what no writer would write
    first, rest = raw.split(b"\n", 1)
    return first + f'\n "digest": "{bytes_digest(raw)}",\n'.encode() + rest


def refused(document: Document) -> str:
    """The one line that refuses the document."""
    with pytest.raises(PackError) as caught:
        parse(document)
    text = str(caught.value)
    assert text.startswith("out/layerpack.json: ") and "\n" not in text
    return text


def blob(place: int, **fields: Any) -> Damage:
    """Set fields of one blob."""
    return lambda document: document["blobs"][place].update(fields)


def find(document: Document, name: str) -> Document:
    """The entry of the tensor with this name."""
    (entry,) = (t for b in document["blobs"] for t in b["tensors"] if t["name"] == name)
    found: Document = entry
    return found


def tensor(name: str, /, **fields: Any) -> Damage:
    """Set fields of the tensor with this name."""
    return lambda document: find(document, name).update(fields)


def state(**fields: Any) -> Damage:
    """Set fields of the quantisation state of UP."""
    return lambda document: find(document, UP)["nf4"].update(fields)


def put(*path: str, value: Any) -> Damage:
    """Set the value at the end of a path of keys."""

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
    """Exchange the two layers."""
    document["blobs"][1:3] = document["blobs"][2:0:-1]


def same_tensor_twice(document: Document) -> None:
    """Give the head's first tensor the name of the embedding."""
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
