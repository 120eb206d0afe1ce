"""What a run of `layerpack bench` may be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """`rows`: names, all if empty. `num_layers`: how many the rows of other methods are timed with
    (None: about 4 GB of them). `row_s`: no further pass of a row begins after so many seconds.
    `scratch`: where 16-bit layers are written for a while (None: beside the pack).
    """

    device: str = "auto"
    context_tokens: int = 512
    passes: int = 5
    rows: tuple[str, ...] = ()
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    num_layers: int | None = None
    row_s: float = 30.0
    scratch: Path | None = None
