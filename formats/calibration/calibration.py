"""A calibration: a safetensors file for each decoder layer and `calibration.json`, written last.

docs/calibration.md describes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerpack.formats.calibration.inputs import (
    PARTS,
    USERS,
    Inputs,
    check_inputs,
    layer_name,
    parse_users,
)
from layerpack.formats.calibration.record import RECORD_NAME, Record, parse_record
from layerpack.formats.digest import Digest, bytes_digest
from layerpack.formats.each_file import ReportBytes, for_each_file
from layerpack.formats.errors import CalibrationError
from layerpack.formats.jsontext import parse_json
from layerpack.formats.text import first_line

_NUM_THREADS = 8  # that read files for their digests
_CHUNK_BYTES = 8 << 20


class Calibration:
    """A whole one, for reading. Threads may share it."""

    def __init__(self, path: Path, record: Record, digest: str, layers: list[str]) -> None:
        self.path, self.record = path, record
        self.digest = digest
        """Of calibration.json, and so of everything."""
        self._layers = layers
        self._layer_of: dict[str, int] = {}
        self.num_columns: dict[str, int] = {}
        """How many inputs there are, by the name of them."""
        self.users: dict[str, str] = {}
        """Of each weight, by its name in the pack, the name of its inputs: some share them."""
        for layer in range(len(layers)):
            with self._opened(layer) as tensors:
                text = (tensors.metadata() or {}).get(USERS, "{}")
                users = parse_users(parse_json(text.encode()))
                for name in set(users.values()):
                    shape = tensors.get_slice(f"{name}.importance").get_shape()
                    if len(shape) != 1:
                        raise ValueError(f"{name}.importance has {len(shape)} dimensions")
                    self.num_columns[name], self._layer_of[name] = shape[0], layer
            self.users |= users

    @classmethod
    def open(cls, path: Path | str) -> Calibration:
        """Raises CalibrationError if it is none, or not whole."""
        path = Path(path)
        file = path / RECORD_NAME
        try:
            raw = file.read_bytes()
        except OSError as reason:
            raise CalibrationError(
                f"{path}: no calibration ({RECORD_NAME}: {reason.strerror}); make one with "
                "`layerpack calibrate`"
            ) from reason
        try:
            record, layers = parse_record(parse_json(raw))
        except (TypeError, ValueError, KeyError) as reason:
            raise CalibrationError(
                f"{file}: damaged ({first_line(reason)}); make it again"
            ) from reason
        return cls(path, record, bytes_digest(raw), layers)

    def inputs(self, name: str) -> Inputs:
        """What is known of them. Raises CalibrationError."""
        with self._opened(self._layer_of[name]) as tensors:
            found = Inputs(**{part: tensors.get_tensor(f"{name}.{part}") for part in PARTS})
            check_inputs(
                found,
                num_columns=self.num_columns[name],
                group_columns=self.record.group_columns,
            )
        return found

    def verify(self) -> None:
        """Read every file against its digest, some at once. Raises CalibrationError."""
        layers = range(len(self._layers))
        for_each_file(layers, self._verify_layer, num_threads=_NUM_THREADS, total_bytes=0)

    def _verify_layer(self, layer: int, report: ReportBytes) -> None:
        file, digest = self.path / layer_name(layer), Digest()
        try:
            with open(file, "rb", buffering=0) as opened:
                while data := opened.read(_CHUNK_BYTES):
                    digest.update(data)
                    report(0)
        except OSError as reason:
            raise CalibrationError(f"{file}: cannot be read ({reason.strerror})") from reason
        if digest.text != self._layers[layer]:
            raise CalibrationError(f"{file}: damaged; make the calibration again")

    @contextmanager
    def _opened(self, layer: int) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        file = self.path / layer_name(layer)
        try:
            with safe_open(file, framework="np") as tensors:
                yield tensors
        except (OSError, SafetensorError, ValueError) as reason:
            raise CalibrationError(
                f"{file}: cannot be read ({first_line(reason)}); make the calibration again"
            ) from reason
