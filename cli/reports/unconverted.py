"""`layerpack inspect` before and beside a finished pack: sources, unfinished work, errors.

What asks for the converter; imported only when it is needed, as most of it brings in torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from layerpack.cli.progress import byte_bar
from layerpack.cli.reports.documents import pack_document
from layerpack.cli.reports.lines import columns, human_seconds, pack_lines, source_line
from layerpack.convert.options import ConvertOptions
from layerpack.convert.output.unfinished import Unfinished
from layerpack.formats.pack import Pack
from layerpack.formats.text import printable
from layerpack.formats.units import human_bytes


def unfinished_lines(work: Unfinished) -> Iterator[str]:
    """How far a conversion is."""
    state = ", running now" if work.running else ", not running"
    yield printable(f"{work.out}: unfinished conversion in {work.partial.name}{state}")
    if work.outline is None:
        yield "nothing is done yet; the same `layerpack convert` command starts over"
        return
    total = len(work.outline.blobs)
    yield f"source        {source_line(work.outline.source)}"
    yield printable(f"model         {work.outline.architecture}, {total} blobs")
    share = work.done_bytes / max(1, work.total_bytes)
    yield (
        f"done          {len(work.done)} of {total} blobs, {human_bytes(work.done_bytes)} "
        f"of {human_bytes(work.total_bytes)} ({share:.0%})"
        + (f", compressed to {human_bytes(work.stored_bytes)}" if work.compressed else "")
    )
    if work.started:
        file, file_bytes = work.started
        whole = ("at most " if work.compressed else "") + human_bytes(
            work.outline.blobs.get(file, 0)
        )
        yield printable(f"being written {file}, {human_bytes(file_bytes)} of {whole}")
    if work.missing:
        ranges = ", ".join(_ranges(work.missing, list(work.outline.blobs)))
        yield printable(f"missing       {ranges}")
    files = len(work.outline.source.files)
    yield f"source files  {work.digested_files} of {files} read and digested"
    if work.scratch_bytes:
        yield f"scratch       {human_bytes(work.scratch_bytes)} of downloads"
    if not work.running:
        yield "to go on, run the same `layerpack convert` command again"


def unfinished_document(work: Unfinished) -> dict[str, Any]:
    """The same for machines."""
    outline = work.outline
    return {
        "kind": "unfinished",
        "path": str(work.partial),
        "out": str(work.out),
        "running": work.running,
        "source": None if outline is None else asdict(outline.source),
        "architecture": None if outline is None else outline.architecture,
        "blobs": {} if outline is None else outline.blobs,
        "done": work.done,
        "missing": work.missing,
        "being_written": work.started and {"file": work.started[0], "bytes": work.started[1]},
        "done_bytes": work.done_bytes,
        "stored_bytes": work.stored_bytes,
        "total_bytes": work.total_bytes,
        "digested_source_files": work.digested_files,
        "scratch_bytes": work.scratch_bytes,
    }


def forecast_lines(
    source: str, options: ConvertOptions, *, download_mb_s: float, **how: Any
) -> Iterator[str]:
    """What a conversion would make of a source. Raises SourceError."""
    from layerpack.convert.forecast import forecast

    found = forecast(source, options)
    yield from pack_lines(f"{source}, once converted", found.manifest, **how)
    yield ""
    download_s, disk_s = found.download_s(download_mb_s), found.disk_s(how["disk_gb_s"])
    yield (
        f"converting writes {human_bytes(found.manifest.total_bytes)} (less with --zstd) and "
        f"needs {human_bytes(found.scratch_bytes)} of scratch beside it; at least "
        f"{human_seconds(max(download_s, disk_s))}:"
    )
    if found.download_bytes:
        yield (
            f"  {human_seconds(download_s)} to download {human_bytes(found.download_bytes)} "
            f"at {download_mb_s:g} MB/s (--download)"
        )
    yield (
        f"  {human_seconds(disk_s)} for {human_bytes(found.disk_bytes)} at the disk, "
        f"{how['disk_gb_s']:g} GB/s (--disk); quantising is not counted"
    )
    for note in found.notes:
        yield printable(f"note: {note}")


def forecast_document(
    source: str, options: ConvertOptions, *, download_mb_s: float, **how: Any
) -> dict[str, Any]:
    """The same for machines."""
    from layerpack.convert.forecast import forecast

    found = forecast(source, options)
    return {
        "kind": "source",
        "path": source,
        "notes": found.notes,
        **pack_document(found.manifest, **how),
        "conversion": {
            "download_bytes": found.download_bytes,
            "scratch_bytes": found.scratch_bytes,
            "disk_bytes": found.disk_bytes,
            "download_mb_s": download_mb_s,
            "download_s": found.download_s(download_mb_s),
            "disk_s": found.disk_s(how["disk_gb_s"]),
        },
    }


def error_rows(pack: Pack, source: str | None) -> list[dict[str, Any]]:
    """Quantisation error of each blob, with a bar while it is measured. Raises SourceError."""
    from layerpack.convert.stats import blob_errors

    total = sum(blob.num_parameters for blob in pack.manifest.blobs)
    # Time goes with the parameters, so the bytes shown are the pack's in proportion to them.
    total_bytes, compared = pack.manifest.total_bytes, 0
    with byte_bar("compare") as show:

        def report(parameters: int) -> None:
            nonlocal compared
            compared += parameters
            show(total_bytes * compared // total, total_bytes)

        return [asdict(row) for row in blob_errors(pack, source, report)]


def error_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The errors as a table, and the worst tensor of all."""
    head = ("file", "relative error", "worst tensor", "its error")
    body = [
        (
            row["file"],
            f"{row['error']:.5f}",
            row["worst_tensor"],
            f"{row['worst_error']:.5f}",
        )
        for row in rows
    ]
    yield from columns([head, *body], right=(1, 3))
    worst = max(rows, key=lambda row: float(row["worst_error"]), default=None)
    if worst is not None and math.isfinite(worst["worst_error"]):
        yield printable(f"worst of all: {worst['worst_tensor']}, {worst['worst_error']:.5f}")


def _ranges(files: Sequence[str], order: list[str]) -> Iterator[str]:
    """`a, b … f`: runs that follow each other in `order`."""
    first = last = ""
    for file in files:
        if last and order.index(file) == order.index(last) + 1:
            last = file
            continue
        if last:
            yield first if first == last else f"{first} … {last}"
        first = last = file
    if last:
        yield first if first == last else f"{first} … {last}"
