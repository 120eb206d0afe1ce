"""What an earlier, broken run of the same conversion left, and what is still to be done."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from layerpack.convert.output.destination import Destination
from layerpack.convert.output.journal import (
    BlobRecord,
    Progress,
    fingerprint,
    read_journal,
)
from layerpack.convert.output.outline import parse_outline
from layerpack.convert.plan.config import read_config
from layerpack.convert.plan.plan import BlobPlan, ConversionPlan
from layerpack.convert.source.protocol import Source
from layerpack.formats.blob.layout import Nf4Spec
from layerpack.formats.errors import LayerpackError, TargetError
from layerpack.formats.manifest.facts import FORMAT_VERSION
from layerpack.formats.pack import stored_header


def producer() -> str:
    """Name and version of what writes the pack: part of its bytes."""
    return f"layerpack {version('layerpack')}"


def run_fingerprint(plan: ConversionPlan, source: Source) -> str:
    """One text for all that decides the bytes of a pack: source, options, format, version.

    But for the source's name as the user gave it, which is in the manifest alone.
    """
    how = plan.quantization
    return fingerprint(
        {
            "format": FORMAT_VERSION,
            "producer": producer(),
            "source": [source.kind, source.place, source.revision],
            "files": [
                # What a GGUF file is called is in its place already, and a link may call it else.
                ["" if source.kind == "gguf" else file.name, file.file_bytes, file.identity]
                for file in source.files
            ],
            "config": read_config(source.config_dir),
            "quantization": how and [how.block_size, how.double_quant, how.head],
            **({"calibration": how.calibration.digest} if how and how.calibration else {}),
            "compression": plan.compression and [plan.compression.level, plan.compression.library],
            "blobs": [
                [blob.file, blob.layout.file_bytes, [item.source for item in blob.items]]
                for blob in plan.blobs
            ],
        }
    )


def find_done(
    plan: ConversionPlan, run: str, source: Source, destination: Destination, *, force: bool
) -> Progress:
    """What of this run is finished; what is not is cleared away.

    Raises TargetError if the directory holds another conversion's work; with `force` that goes.
    """
    found = read_journal(destination.journal)
    if found.runs - {run}:
        if not force:
            raise TargetError(
                f"{destination.partial}: holds an unfinished conversion {_of_what(found, source)}, "
                "remove the directory, or start over with --force"
            )
        destination.discard(in_use=source.config_dir)
        found = Progress()
    blobs = {
        blob.file: found.blobs[blob.file]
        for blob in plan.blobs
        if blob.file in found.blobs and _is_whole(blob, found.blobs[blob.file], destination)
    }
    for path in destination.pack_files():
        if path.name not in blobs:
            path.unlink()
    return Progress(blobs=blobs, source_digests=found.source_digests)


def _of_what(found: Progress, source: Source) -> str:
    """How unfinished work differs from what is asked for, and how it can be finished."""
    outline = parse_outline(found.about)
    if outline is None or outline.place == source.place:
        before, now = outline and outline.source.revision, source.revision
        if before and before != now:  # somebody changed the repository, if only its README
            return f"of commit {before}, not of {now}; finish that one with --revision {before}"
        return "of another source, or with other options; finish that one"
    found_files = {file.name: file.file_bytes for file in outline.source.files}
    alike = found_files == {file.name: file.file_bytes for file in source.files}
    # That, and times of change, do not tell a source that was moved from another of its kind.
    hint = " (move it back, if it was moved)" if alike and source.kind != "hub" else ""
    return f"of another source, {outline.place}, not of {source.place}; finish that one{hint}"


def _is_whole(blob: BlobPlan, record: BlobRecord, destination: Destination) -> bool:
    """Size, header and states against the plan. Contents are what the digest is for."""
    path = destination.pack / blob.file
    try:
        same_header = stored_header(path, record.frames) == blob.layout.tensors
        same_size = record.frames is None or path.stat().st_size == record.frames.file_bytes
    except (LayerpackError, OSError):
        return False
    return (
        same_header
        and same_size
        and _shapes(record)
        == {
            item.spec.name: item.spec.shape for item in blob.items if isinstance(item.spec, Nf4Spec)
        }
    )


def _shapes(record: BlobRecord) -> Mapping[str, tuple[int, ...]]:
    return {name: state.shape for name, state in record.states.items()}
