"""Any value or byte in `layerpack.json`: it is read, or refused in one line."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packs.manifest_damage import UP, parse, put

from layerpack.formats.errors import PackError
from layerpack.formats.manifest.document import dump_manifest, parse_manifest
from layerpack.formats.manifest.facts import Manifest


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
