"""JSON that nobody vouches for: what is JSON is read, all else is a ValueError with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerpack.formats.jsontext import dump_json, parse_json

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_what_is_written_is_read(value: Any) -> None:
    raw = dump_json(value)
    assert parse_json(raw) == value
    assert raw.endswith(b"\n") and dump_json(parse_json(raw)) == raw
    assert parse_json(json.dumps(value).encode()) == value


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(st.sampled_from('{}[]",:\\ud8e0aE+-.'), max_size=30))
def test_noise_is_read_or_refused(raw: bytes | str) -> None:
    try:
        value = parse_json(raw if isinstance(raw, bytes) else raw.encode())
    except ValueError as reason:
        assert str(reason)
    else:
        json.dumps(value, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"a": 1, "a": 1}', "duplicate key 'a'"),
        (b'[{"b": {"a": 1, "a": 2}}]', "duplicate key 'a'"),
        (b"[NaN]", "NaN is not JSON"),
        (b"-Infinity", "-Infinity is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'"\\ud83d"', "an escape that is no character"),
        (b'{"\\ude00": 1}', "an escape that is no character"),
        (b'"\xed\xa0\x80"', "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"{} {}", "Extra data"),
        (b"1" * 5000, "digits"),
    ],
)
def test_each_refusal_has_its_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_json(raw)
    assert reason in str(caught.value)


def test_a_whole_pair_of_escapes_is_a_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


def test_nothing_is_written_that_is_not_json() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            dump_json(value)
