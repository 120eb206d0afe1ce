"""What a conversion would make of a source, found out without converting anything.

Headers, config and tokenizer are read (from the Hub, fetched), weights are not.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from layerpack.convert.api import make_manifest, plan_source
from layerpack.convert.open_source import open_source
from layerpack.convert.options import ConvertOptions
from layerpack.convert.output.journal import BlobRecord, Progress
from layerpack.convert.output.small_files import small_files
from layerpack.convert.plan.plan import BlobPlan
from layerpack.formats.blob.layout import Nf4Spec
from layerpack.formats.blob.nf4 import Nf4State
from layerpack.formats.manifest.facts import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """`manifest` is that of the pack to be, without digests and offsets, which weights decide.

    They decide how far zstd gets, too: this is the plain pack, and a compressed one at most as big.
    `download_bytes` are to come from the Hub, what its cache holds left out; `scratch_bytes` is
    the room needed beside the pack while converting; `notes` what to know before, a line each.
    """

    manifest: Manifest
    download_bytes: int
    scratch_bytes: int
    notes: tuple[str, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's weight files."""
        return sum(file.file_bytes for file in self.manifest.source.files)

    @property
    def disk_bytes(self) -> int:
        """What passes the disk: downloads written, the source read, the pack written."""
        return self.download_bytes + self.source_bytes + self.manifest.total_bytes

    def download_s(self, mb_per_s: float) -> float:
        """Seconds to download what is not here, at a speed in units of 10**6 bytes."""
        return self.download_bytes / (mb_per_s * 1e6)

    def disk_s(self, gb_per_s: float) -> float:
        """Seconds at the disk, at a speed in units of 10**9 bytes."""
        return self.disk_bytes / (gb_per_s * 1e9)


def forecast(source: str, options: ConvertOptions | None = None) -> Forecast:
    """The forecast for a checkpoint directory, a GGUF file or a Hub repo id. Raises SourceError."""
    options = replace(options or ConvertOptions(), zstd_level=None)
    with (
        tempfile.TemporaryDirectory(prefix="layerpack-look-") as scratch,
        open_source(source, options, scratch=Path(scratch)) as opened,
    ):
        plan = plan_source(opened, options)
        expected = Progress(
            blobs={blob.file: _expected(blob) for blob in plan.blobs},
            source_digests={file.name: "" for file in opened.files},
        )
        small = small_files(plan, opened.config_dir, scratch=Path(scratch))
        return Forecast(
            notes=(*plan.notes, *small.notes),
            manifest=make_manifest(plan, expected, opened, files=()),
            download_bytes=opened.download_bytes,
            scratch_bytes=opened.scratch_bytes,
        )


def _expected(blob: BlobPlan) -> BlobRecord:
    states = {
        item.spec.name: Nf4State(
            shape=item.spec.shape,
            block_size=item.spec.block_size,
            dtype=item.dtype,
            nested_offset=0.0 if item.spec.double_quant else None,
        )
        for item in blob.items
        if isinstance(item.spec, Nf4Spec)
    }
    return BlobRecord(file=blob.file, digest="", states=states)
