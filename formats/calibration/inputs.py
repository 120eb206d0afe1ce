"""What is known of a layer's inputs, and the file that holds it for a decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerpack.formats.jsontext import dump_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

USERS, PARTS = "users", ("importance", "order", "feedback")
"""In a file's metadata: the weights that use each inputs; the tensors of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Of the inputs (in,) of a linear layer.

    `importance` (in,), float32, positive: mean squares. `order` (in,), int32: the columns as they
    get their codes, in groups of as many as `feedback` (in, group), float16, has columns. Row p
    there: how much of the error of column order[p] each later column of its group takes off.
    """

    importance: NDArray[np.float32]
    order: NDArray[np.int32]
    feedback: NDArray[np.float16]


def layer_name(layer: int) -> str:
    """The file of a decoder layer."""
    return f"layer-{layer:03d}.safetensors"


def layer_bytes(inputs: Mapping[str, Inputs], users: Mapping[str, str]) -> bytes:
    """A layer's file: `inputs` by name, and of each weight that uses some their name."""
    from safetensors.numpy import save

    parts = {
        f"{name}.{part}": getattr(found, part) for name, found in inputs.items() for part in PARTS
    }
    return bytes(save(parts, metadata={USERS: dump_json(dict(users)).decode()}))
