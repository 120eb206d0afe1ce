"""What is known of a layer's inputs, and the file that holds it for a decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


def check_inputs(inputs: Inputs, *, num_columns: int, group_columns: int) -> None:
    """Raises ValueError for what would lead arithmetic astray, or out of its arrays."""
    import numpy as np

    shapes = {
        "importance": ("float32", (num_columns,)),
        "order": ("int32", (num_columns,)),
        "feedback": ("float16", (num_columns, min(num_columns, group_columns))),
    }
    for part, expected in shapes.items():
        found = getattr(inputs, part)
        if (found.dtype.name, found.shape) != expected:
            raise ValueError(f"{part} is {found.dtype.name} {found.shape}, not {expected}")
    if not (np.isfinite(inputs.importance).all() and (inputs.importance > 0).all()):
        raise ValueError("importance is not positive")
    if not np.array_equal(np.sort(inputs.order), np.arange(num_columns)):
        raise ValueError("order does not name every column once")
    exponent = np.uint16(0x7C00)  # all of whose bits are set in what is not finite
    if (inputs.feedback.view(np.uint16) & exponent).max(initial=0) == exponent:
        raise ValueError("feedback is not finite")


def parse_users(document: Any) -> dict[str, str]:
    """The name of its inputs for each weight. Raises ValueError."""
    if not isinstance(document, dict) or not all(isinstance(n, str) for n in document.values()):
        raise ValueError(f"{USERS} is not valid")
    return document


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
