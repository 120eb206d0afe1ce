"""Calibrations made of inputs at hand, by the textbook, and of random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerpack.formats.calibration.calibration import Calibration
from layerpack.formats.calibration.inputs import Inputs, layer_bytes, layer_name
from layerpack.formats.calibration.record import RECORD_NAME, Record, record_bytes
from layerpack.formats.digest import bytes_digest
from layerpack.formats.pack import Pack

Known = Inputs


def inputs_from(rows: torch.Tensor, group: int, damping: float = 0.1) -> Inputs:
    """Of a layer whose inputs are `rows` (tokens, in)."""
    squares = (rows.double().T @ rows.double()) / len(rows)
    order = squares.diagonal().argsort(descending=True)
    columns = len(order)
    feedback = torch.zeros(columns, min(group, columns))
    for begin in range(0, columns, group):
        own = order[begin : begin + group]
        hessian = squares[own][:, own] + damping * squares.diagonal().mean() * torch.eye(len(own))
        # Of the errors so far: row p of the inverse of what is left from column p on.
        for place in range(len(own)):
            inverse = torch.linalg.inv(hessian[place:, place:])
            feedback[begin + place, place + 1 : len(own)] = inverse[0, 1:] / inverse[0, 0]
    return Inputs(
        importance=squares.diagonal().float().numpy(),
        order=order.int().numpy(),
        feedback=feedback.numpy().astype(np.float16),
    )


def calibration_of(path: Path, inputs: Inputs) -> Calibration:
    """One of a single layer with the weight "w"."""
    path.mkdir(parents=True, exist_ok=True)
    data = layer_bytes({"w": inputs}, {"w": "w"})
    (path / layer_name(0)).write_bytes(data)
    record = Record(
        producer="tests",
        architecture="None",
        num_layers=1,
        source="",
        text=bytes_digest(b""),
        num_tokens=1,
        group_columns=inputs.feedback.shape[1],
        damping=0.1,
    )
    (path / RECORD_NAME).write_bytes(record_bytes(record, [bytes_digest(data)]))
    return Calibration.open(path)


def calibration_for(pack: Path, path: Path, *, leave_out: str = "none", **changes: Any) -> Path:
    """One with inputs of its own for every quantised weight of a pack."""
    manifest = Pack.open(pack).manifest
    path.mkdir()
    draw, digests = np.random.default_rng(0), []
    for layer, blob in enumerate(b for b in manifest.blobs if b.layer is not None):
        inputs = {}
        for name, state in blob.nf4.items():
            columns = state.shape[1]
            if leave_out in name:
                continue
            inputs[name.removesuffix(".weight")] = Inputs(
                importance=draw.random(columns).astype(np.float32) + 0.1,
                order=draw.permutation(columns).astype(np.int32),
                feedback=np.triu(draw.normal(0, 0.1, (columns, columns)), 1).astype(np.float16),
            )
        data = layer_bytes(inputs, {f"{name}.weight": name for name in inputs})
        (path / layer_name(layer)).write_bytes(data)
        digests.append(bytes_digest(data))
    fields: dict[str, Any] = {
        "producer": "tests",
        "architecture": manifest.model.architecture,
        "num_layers": manifest.model.num_layers,
        "source": "",
        "text": bytes_digest(b""),
        "num_tokens": 2048,
        "group_columns": 1024,
        "damping": 0.3,
    }
    (path / RECORD_NAME).write_bytes(record_bytes(Record(**(fields | changes)), digests))
    return path
