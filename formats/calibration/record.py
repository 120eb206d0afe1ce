"""calibration.json: what a calibration was made of, and the digests of its layers' files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerpack.formats.blob.nf4 import BLOCK_SIZES
from layerpack.formats.digest import is_digest
from layerpack.formats.jsontext import dump_json

RECORD_NAME = "calibration.json"
_FORMAT, _VERSION = "layerpack-calibration", 1
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a calibration was made of. `text`: digest of the tokens; `source`: of the pack."""

    producer: str
    architecture: str
    num_layers: int
    source: str
    text: str
    num_tokens: int
    group_columns: int
    damping: float


def record_bytes(record: Record, layers: list[str]) -> bytes:
    """calibration.json; `layers`: the digests of the layers' files."""
    fields = {key: getattr(record, key) for key in record.__dataclass_fields__}
    return dump_json({"format": _FORMAT, "format_version": _VERSION, **fields, "layers": layers})


def parse_record(document: Any) -> tuple[Record, list[str]]:
    """The record and the digests. Raises ValueError, KeyError or TypeError."""
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError("not a calibration")
    if document.get("format_version") != _VERSION:
        raise ValueError(f"format_version {document.get('format_version')!r}, not {_VERSION}")
    fields: dict[str, Any] = {}
    for key, kind in Record.__annotations__.items():
        value = document[key]
        if not isinstance(value, _KINDS[kind]) or isinstance(value, bool):
            raise ValueError(f"{key} is not valid")
        fields[key] = value
    unit = BLOCK_SIZES[0]  # which all of a weight's columns are a multiple of
    if fields["group_columns"] <= 0 or fields["group_columns"] % unit:
        raise ValueError(f"group_columns is {fields['group_columns']}: no multiple of {unit}")
    layers = document["layers"]
    if not isinstance(layers, list) or not all(map(is_digest, layers)):
        raise ValueError("layers are not digests")
    if len(layers) != fields["num_layers"]:
        raise ValueError("a layer is missing")
    return Record(**fields), layers
