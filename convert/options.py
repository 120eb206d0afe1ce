"""What a user can ask of a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """`nf4` False leaves all weights in 16 bits.

    `block_size` and `double_quant` None: 64 and on, or what an NF4 source has already.
    `nf4_head` quantises lm_head, too. `device` (auto, cpu, cuda …) is where weights are quantised;
    the bytes do not depend on it. `force` replaces what stands under the target's name and starts
    over where an unfinished conversion does not fit. `zstd_level` (1 to 22) compresses the pack.
    `revision` and `keep_source` concern the Hub. `skip` are patterns, as in a shell, of tensors to
    leave out if the model has no place for them. `calibration`: a directory that `layerpack
    calibrate` wrote, to choose codes and scales by.
    """

    nf4: bool = True
    block_size: int | None = None
    double_quant: bool | None = None
    nf4_head: bool = False
    device: str = "auto"
    force: bool = False
    revision: str | None = None
    keep_source: bool = False
    zstd_level: int | None = None
    skip: tuple[str, ...] = ()
    calibration: Path | None = None
