"""Calibrations made of inputs at hand, by the textbook."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from layerpack.formats.calibration.calibration import Calibration
from layerpack.formats.calibration.inputs import Inputs, layer_bytes, layer_name
from layerpack.formats.calibration.record import RECORD_NAME, Record, record_bytes
from layerpack.formats.digest import bytes_digest

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
