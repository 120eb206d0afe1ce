"""What a conversion will still take, known beforehand: downloads, pack, scratch space."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from layerpack.convert.output.destination import Destination
from layerpack.convert.output.journal import Progress
from layerpack.convert.plan.plan import BlobPlan, ConversionPlan
from layerpack.convert.source.protocol import Source
from layerpack.formats.blob.layout import Nf4Spec
from layerpack.formats.units import align_up

_LEAST_NF4, _LEAST_OTHER = 0.9, 0.5
"""zstd leaves more than that of real weights: 0.92 of NF4 codes, 0.65 of 16-bit floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """What is left to do. `scratch_bytes` are needed beside the pack, for a while.

    `kept_bytes` are needed for good: downloads that stay in a cache on the pack's own disk.
    `pack_bytes` is the most that the rest of the pack takes, and `least_pack_bytes` the least: the
    same, unless it is compressed, as only the weights themselves tell how far that goes.
    `fetched_bytes` are those of the source files still to be gone through, `download_bytes` those
    of them that are not on this machine. `notes` are for the user, a line each.
    """

    architecture: str
    num_layers: int
    num_blobs: int
    done_blobs: int
    pack_bytes: int
    least_pack_bytes: int
    fetched_bytes: int
    download_bytes: int
    scratch_bytes: int
    kept_bytes: int
    free_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def fits_if_small(self) -> bool:
        """Whether the disk has room enough only if compression leaves less than the most."""
        free_bytes = self.free_bytes - self.scratch_bytes - self.kept_bytes
        return self.least_pack_bytes <= free_bytes < self.pack_bytes


def find_remaining(
    plan: ConversionPlan,
    source: Source,
    destination: Destination,
    done: Progress,
    *,
    cache: Path | None = None,
) -> Remaining:
    """The rest of a conversion of which `done` is done. Reads no weight.

    `cache` is a directory that exists where downloads stay, if they do.
    """
    left = [blob for blob in plan.blobs if blob.file not in done.blobs]
    needed = {file for blob in left for file in blob.source_files}
    files = [f for f in source.files if f.name in needed or f.name not in done.source_digests]
    remote = {file.name: file.file_bytes for file in files if file.remote}
    compressed = plan.compression is not None
    plain_bytes = [blob.layout.file_bytes for blob in left]
    # Where nothing can be saved, frames lie as they are; their file ends with a page.
    pack_bytes = sum(map(align_up, plain_bytes) if compressed else plain_bytes)
    return Remaining(
        architecture=plan.structure.architecture,
        num_layers=len(plan.structure.layers),
        num_blobs=len(plan.blobs),
        done_blobs=len(plan.blobs) - len(left),
        pack_bytes=pack_bytes,
        least_pack_bytes=sum(map(_least_bytes, left)) if compressed else pack_bytes,
        fetched_bytes=sum(file.file_bytes for file in files),
        download_bytes=sum(remote.values()),
        scratch_bytes=_scratch_bytes(left, source, destination, remote),
        kept_bytes=sum(remote.values()) if _on_one_disk(cache, destination.partial) else 0,
        free_bytes=shutil.disk_usage(destination.partial).free,
    )


def _on_one_disk(cache: Path | None, other: Path) -> bool:
    return cache is not None and cache.stat().st_dev == other.stat().st_dev


def _least_bytes(blob: BlobPlan) -> int:
    """What remains of a blob's weights; padding and constants may vanish."""
    lengths = {entry.name: entry.length_bytes for entry in blob.layout.tensors}
    return sum(
        int(
            lengths[item.spec.name]
            * (_LEAST_NF4 if isinstance(item.spec, Nf4Spec) else _LEAST_OTHER)
        )
        for item in blob.items
    )


def _scratch_bytes(
    left: list[BlobPlan], source: Source, destination: Destination, remote: dict[str, int]
) -> int:
    """Most that downloads take at a time, less what an earlier run has left of them."""
    if not source.scratch_bytes:
        return 0
    few = sorted(remote.values())[-source.max_held_files :]
    at_once = [sum(remote.get(file, 0) for file in blob.source_files) for blob in left]
    present = (destination.scratch / name for name in remote)
    here = sum(path.stat().st_size for path in present if path.is_file())
    return max(0, max(sum(few), *at_once, 0) - here)
