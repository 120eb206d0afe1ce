"""One conversion, from the name of a checkpoint to a pack under the target's name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from layerpack.convert.gptq.encoder import CalibratedEncoder
from layerpack.convert.hub.download import existing_part, usual_cache
from layerpack.convert.nf4.blocks import useful_workers
from layerpack.convert.open_source import open_source
from layerpack.convert.options import ConvertOptions
from layerpack.convert.output.destination import Destination
from layerpack.convert.output.journal import Journal, Progress
from layerpack.convert.output.outline import outline_of
from layerpack.convert.output.remaining import Remaining, find_remaining
from layerpack.convert.output.resume import find_done, producer, run_fingerprint
from layerpack.convert.output.small_files import SmallFiles, small_files
from layerpack.convert.pipeline.pipeline import run_pipeline
from layerpack.convert.plan.calibrated import calibrated
from layerpack.convert.plan.config import read_config
from layerpack.convert.plan.plan import ConversionPlan
from layerpack.convert.plan.planner import plan_conversion
from layerpack.convert.plan.storage import find_storage
from layerpack.convert.plan.structure import find_structure
from layerpack.convert.source.protocol import Source
from layerpack.formats.calibration.calibration import Calibration
from layerpack.formats.digest import bytes_digest
from layerpack.formats.disk import is_full
from layerpack.formats.each_file import ProgressCallback
from layerpack.formats.errors import CapacityError, TargetError
from layerpack.formats.manifest import facts as pack
from layerpack.formats.manifest.document import dump_manifest
from layerpack.formats.units import num_elements


def convert(
    source: str,
    out: Path | str,
    options: ConvertOptions | None = None,
    progress: ProgressCallback | None = None,
    announce: Callable[[Remaining], None] | None = None,
) -> pack.Manifest:
    """Convert a checkpoint (directory, GGUF file or Hub repo id) to a pack at `out`.

    After any break the same call goes on where it was, with the same bytes in the end. `progress`
    gets bytes done and bytes in all; what is downloaded counts when it arrives, too. `announce`
    is told what there is to do, before any weight is read and before space is found to lack. Raises
    SourceError, TargetError (DiskFullError), UnsupportedError, HubError or CalibrationError;
    nothing appears under the target's name unless it is whole.
    """
    options = options or ConvertOptions()
    destination = Destination(out)
    destination.refuse_source(source)
    destination.check_target(force=options.force)
    device = _device(options.device)
    with (
        destination.held(),
        open_source(source, options, scratch=destination.scratch) as opened,
    ):
        plan = plan_source(opened, options)
        encoder = None
        if options.calibration is not None:
            plan, encoder = _calibrated(plan, options.calibration, device)
        run = run_fingerprint(plan, opened)
        try:
            done = replace(
                find_done(plan, run, opened, destination, force=options.force),
                about=outline_of(plan, opened).fields(),
            )
            keeps = options.keep_source and opened.kind == "hub"
            cache = existing_part(usual_cache()) if keeps else None
            small = small_files(plan, opened.config_dir, scratch=destination.partial)
            work = replace(
                find_remaining(plan, opened, destination, done, cache=cache),
                notes=(*plan.notes, *small.notes),
            )
            if announce is not None:
                announce(work)
            destination.check_space(
                pack_bytes=work.pack_bytes,
                download_bytes=work.scratch_bytes + work.kept_bytes,
                least_pack_bytes=work.least_pack_bytes,
            )
            with Journal(destination.journal, run, done) as journal:
                destination.sync_names()
                _write_blobs(plan, work, opened, destination, journal, device, progress, encoder)
            files = _write_small_files(small, destination)
            manifest = make_manifest(plan, done, opened, files)
            destination.write_file(pack.MANIFEST_NAME, dump_manifest(manifest))
            destination.commit(force=options.force)
        except OSError as reason:
            if is_full(reason):
                raise destination.disk_full(
                    _missing_bytes(plan, destination), compressed=plan.compression is not None
                ) from reason
            raise TargetError(
                f"{reason.filename or destination.partial}: {reason.strerror}"
            ) from reason
    return manifest


def plan_source(source: Source, options: ConvertOptions) -> ConversionPlan:
    """What a conversion of an opened source would write. Reads no weight. Raises SourceError."""
    config = read_config(source.config_dir)
    where = str(source.id)
    storage = find_storage(config, source.tensors, source.config_dir, where=where)
    return plan_conversion(
        find_structure(source.config_dir),
        storage,
        source.tensors,
        [file.name for file in source.files],
        options,
        where=where,
    )


def make_manifest(
    plan: ConversionPlan, done: Progress, source: Source, files: Iterable[pack.FileEntry]
) -> pack.Manifest:
    """The manifest of a conversion whose blobs, files and source digests are all known."""
    structure = plan.structure
    blobs = []
    for blob in plan.blobs:
        record = done.blobs[blob.file]
        blobs.append(
            pack.Blob(
                role=blob.role,
                layer=blob.layer,
                file=blob.file,
                file_bytes=(record.frames or blob.layout).file_bytes,
                digest=record.digest,
                tensors=blob.layout.tensors,
                nf4=record.states,
                frames=record.frames,
            )
        )
    return pack.Manifest(
        producer=producer(),
        source=pack.SourceRecord(
            kind=source.kind,
            id=source.id,
            revision=source.revision,
            files=tuple(
                pack.FileEntry(
                    name=file.name,
                    file_bytes=file.file_bytes,
                    digest=done.source_digests[file.name],
                )
                for file in source.files
            ),
        ),
        model=pack.Model(
            architecture=structure.architecture,
            layers_path=structure.layers_path,
            num_layers=len(structure.layers),
            dtype=structure.dtype,
            embedding=structure.embedding,
            head=structure.head,
            num_parameters=plan.num_parameters,
        ),
        quantization=plan.quantization,
        blobs=tuple(blobs),
        files=tuple(files),
        compression=plan.compression,
    )


def _write_blobs(
    plan: ConversionPlan,
    work: Remaining,
    source: Source,
    destination: Destination,
    journal: Journal,
    device: torch.device,
    progress: ProgressCallback | None,
    encoder: CalibratedEncoder | None,
) -> None:
    done = journal.progress
    blobs = [plan.blobs[place] for place in plan.write_order]
    left = [blob for blob in blobs if blob.file not in done.blobs]
    undigested = [file.name for file in source.files if file.name not in done.source_digests]
    # Elsewhere, fetching moves nothing.
    fetched_bytes = work.fetched_bytes if source.kind == "hub" else 0
    meter = _Meter(progress, fetched_bytes + sum(blob.source_bytes for blob in blobs))
    meter.add(sum(blob.source_bytes for blob in blobs if blob not in left))
    run_pipeline(
        plan,
        left,
        source,
        destination,
        journal,
        device=device,
        undigested=undigested,
        report=meter.add,
        calibrated=encoder,
    )


def _calibrated(
    plan: ConversionPlan, path: Path, device: torch.device
) -> tuple[ConversionPlan, CalibratedEncoder]:
    """The plan with what the calibration does to it, and the time that takes said."""
    calibration = Calibration.open(path)
    calibration.verify()
    plan, names = calibrated(plan, calibration)
    assert plan.quantization is not None
    encoder = CalibratedEncoder(
        calibration, names, block_size=plan.quantization.block_size, device=device
    )
    specs = [item.spec for blob in plan.blobs for item in blob.items if item.spec.name in names]
    sample = max(specs, key=lambda spec: spec.shape[1])
    each_s = encoder.element_s(sample.name, sample.shape[1]) / useful_workers(device)
    whole_s = each_s * sum(num_elements(spec.shape) for spec in specs)
    said = f"choosing codes takes about {whole_s:.0f} s"
    return replace(plan, notes=(*plan.notes, said)), encoder


def _write_small_files(small: SmallFiles, destination: Destination) -> list[pack.FileEntry]:
    """Write them; what the manifest is to say of them."""
    entries = []
    for name, data in sorted(small.files.items()):
        destination.write_file(name, data)
        entries.append(pack.FileEntry(name=name, file_bytes=len(data), digest=bytes_digest(data)))
    return entries


def _missing_bytes(plan: ConversionPlan, destination: Destination) -> int:
    finished = {path.name for path in destination.pack_files()}
    return sum(b.layout.file_bytes for b in plan.blobs if b.file not in finished)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise CapacityError(f"--device {name}: torch finds no CUDA device; use cpu or auto")
    try:
        return torch.device(name)
    except RuntimeError:
        raise CapacityError(f"--device {name}: not a device; use auto, cpu or cuda") from None


class _Meter:
    """Adds up bytes from several threads and tells the callback, one call at a time."""

    def __init__(self, progress: ProgressCallback | None, total_bytes: int) -> None:
        self._progress, self._total_bytes, self._done_bytes = progress, total_bytes, 0
        self._lock = threading.Lock()

    def add(self, count_bytes: int) -> None:
        with self._lock:
            # A shard that is downloaded twice must not carry the sum beyond the total.
            self._done_bytes = min(self._done_bytes + count_bytes, self._total_bytes)
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)
