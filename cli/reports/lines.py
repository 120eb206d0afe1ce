"""What `layerpack inspect` prints for people: aligned columns, sizes with units."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from layerpack.formats.manifest.facts import Blob, Manifest, SourceRecord
from layerpack.formats.summary import (
    BlobSummary,
    PassBytes,
    fold_layers,
    pass_bytes,
    stored_as,
    summarise_blobs,
)
from layerpack.formats.text import printable
from layerpack.formats.units import human_bytes

_COMMIT_DIGITS = 12


def pack_lines(
    title: str, manifest: Manifest, *, all_blobs: bool, link_gb_s: float, disk_gb_s: float
) -> Iterator[str]:
    """Everything about a pack, whether it is there or only planned, but its single tensors."""
    rows = summarise_blobs(manifest.blobs)
    yield from facts_lines(title, manifest)
    yield ""
    yield from blob_lines(rows if all_blobs else fold_layers(rows))
    yield ""
    moved = pass_bytes(manifest)
    yield from pass_lines(moved, tied=manifest.model.tied, link_gb_s=link_gb_s, disk_gb_s=disk_gb_s)


def facts_lines(title: str, manifest: Manifest) -> Iterator[str]:
    """What the model is, where it comes from and how it is stored."""
    model, how = manifest.model, manifest.quantization
    bits = 8 * manifest.total_bytes / max(1, model.num_parameters)
    yield printable(
        f"{title}: {model.architecture}, {model.num_layers} layers, "
        f"{human_count(model.num_parameters)} parameters in {human_bytes(manifest.total_bytes)} "
        f"({bits:.2f} bits each)"
    )
    yield f"source        {source_line(manifest.source)}"
    head = "the embedding (tied)" if model.tied else "NF4" if how and how.head else model.dtype
    stored = f"none; all of it in {model.dtype}"
    if how is not None:
        nested = "double quantisation" if how.double_quant else "scales in float32"
        stored = f"NF4 in blocks of {how.block_size}, {nested}; the rest in {model.dtype}"
    yield printable(f"quantisation  {stored}, lm_head: {head}")
    if how is not None and (chosen := how.calibration) is not None:
        yield (
            f"calibration   codes of {chosen.num_weights} weights, by {chosen.num_tokens} tokens "
            f"({chosen.digest})"
        )
    if (used := manifest.compression) is not None:
        yield printable(
            f"compression   zstd {used.library} at level {used.level}: "
            f"{manifest.total_bytes / max(1, manifest.raw_bytes):.3f} of "
            f"{human_bytes(manifest.raw_bytes)}"
        )
    yield printable(f"made by       {manifest.producer}")


def source_line(source: SourceRecord) -> str:
    """Where weights come from, at which commit, and how much there is of them."""
    text = f"{source.kind} {source.id}"
    if source.revision:
        text += f" at {source.revision[:_COMMIT_DIGITS]}"
    if source.files:
        total = sum(file.file_bytes for file in source.files)
        files = "1 file" if len(source.files) == 1 else f"{len(source.files)} files"
        text += f", {files} of {human_bytes(total)}"
    return printable(text)


def blob_lines(rows: Sequence[BlobSummary]) -> Iterator[str]:
    """The table of blobs, its last line the sum."""
    head = ("role", "file", "bytes", "parameters", "bits each", "weights")
    body = [
        (
            _title(row),
            _files(row),
            _times(row.count, human_bytes(row.file_bytes)),
            _times(row.count, human_count(row.num_parameters)),
            f"{row.bits_per_parameter:.3f}",
            ", ".join(f"{count} {kind}" for kind, count in row.weights),
        )
        for row in rows
    ]
    total_bytes = sum(row.count * row.file_bytes for row in rows)
    total = sum(row.count * row.num_parameters for row in rows)
    bits = 8 * total_bytes / max(1, total)
    body.append(("total", "", human_bytes(total_bytes), human_count(total), f"{bits:.3f}", ""))
    yield from columns([head, *body], right=(2, 3, 4))


def pass_lines(
    moved: PassBytes, *, tied: bool, link_gb_s: float, disk_gb_s: float
) -> Iterator[str]:
    """Bytes moved for each token, and the seconds that this takes where nothing stays loaded."""
    head = "lm_head (the embedding's weight)" if tied else "lm_head"
    yield (
        f"each token streams {human_bytes(moved.total_bytes)}: layers "
        f"{human_bytes(moved.layer_bytes)}, {head} {human_bytes(moved.head_bytes)}"
    )
    link_s, disk_s = moved.link_s(link_gb_s), moved.disk_s(disk_gb_s)
    packed = moved.disk_bytes < moved.total_bytes
    yield (
        f"  {human_seconds(link_s)} from host memory over a link of {link_gb_s:g} GB/s (--link), "
        "nothing kept on the device"
    )
    yield (
        f"  {human_seconds(max(link_s, disk_s))} from a disk of {disk_gb_s:g} GB/s (--disk), "
        "nothing kept in memory either" + (", decompressing not counted" if packed else "")
    )


def tensor_lines(blobs: Iterable[Blob]) -> Iterator[str]:
    """Every stored tensor, quantisation constants included."""
    body = [("tensor", "file", "dtype", "shape", "offset", "bytes", "weight")]
    for blob in blobs:
        kinds = stored_as(blob)
        for entry in blob.tensors:
            state = blob.nf4.get(entry.name)
            weight = f"NF4 of {list(state.shape)}" if state else kinds.get(entry.name, "constants")
            body.append(
                (
                    entry.name,
                    blob.file,
                    entry.dtype,
                    str(list(entry.shape)),
                    str(entry.offset_bytes),
                    str(entry.length_bytes),
                    weight,
                )
            )
    yield from columns(body, right=(4, 5))


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> Iterator[str]:
    """Rows of equal length, each column as wide as its widest cell; `right` are set to the right.

    Cells come from files, so what a terminal would act on is shown escaped.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()


def human_count(count: int) -> str:
    """`72.7 B`, `877.7 M`: billions and millions, as models are named."""
    for divisor, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= divisor:
            return f"{count / divisor:.1f}{unit}"
    return str(count)


def human_seconds(seconds: float) -> str:
    """`3.2 h`, `48 min`, `3.22 s`, `20.3 ms`: three digits at most."""
    for least, unit_s, unit in ((5400, 3600, "h"), (120, 60, "min"), (0.1, 1, "s")):
        if seconds >= least:
            return f"{seconds / unit_s:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def _title(row: BlobSummary) -> str:
    if row.layers is None:
        return row.role.value
    first, last = row.layers
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _files(row: BlobSummary) -> str:
    first, last = row.files
    return first if first == last else f"{first} … {last}"


def _times(count: int, text: str) -> str:
    return text if count == 1 else f"{count} x {text}"
