"""`layerpack convert SOURCE OUT`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from layerpack.cli.progress import byte_bar
from layerpack.cli.sign_of_life import sign_of_life
from layerpack.convert.options import ConvertOptions
from layerpack.formats.blob.nf4 import BLOCK_SIZES
from layerpack.formats.text import printable
from layerpack.formats.units import human_bytes

if TYPE_CHECKING:
    from layerpack.convert.output.remaining import Remaining


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path())
@click.option(
    "--bits",
    type=click.Choice(["4", "16"]),
    default="4",
    show_default=True,
    help="16 leaves all weights in 16 bits: what `eval` compares with.",
)
@click.option(
    "--block-size",
    type=click.Choice([str(size) for size in BLOCK_SIZES]),
    help="Weights that share a scale (64, or what an NF4 source has).",
)
@click.option(
    "--no-double-quant",
    "double_quant",
    flag_value=False,
    type=bool,
    default=None,
    help="Keep the scales in float32: 9 % larger, no better.",
)
@click.option(
    "--head",
    type=click.Choice(["bf16", "nf4"]),
    default="bf16",
    help="How lm_head is stored (bf16: as the model has it, in 16 bits).",
)
@click.option("--device", default="auto", help="Where to quantise: auto, cpu, cuda. Same bytes.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace OUT if it is a pack, and unfinished work of other options.",
)
@click.option("--revision", help="Branch, tag or commit of a Hub repository.")
@click.option(
    "--zstd",
    type=click.IntRange(1, 22),
    metavar="LEVEL",
    help="Compress the pack, without loss: 3 % on NF4, 30 % on 16-bit parts. 1 will do.",
)
@click.option(
    "--skip",
    multiple=True,
    metavar="PATTERN",
    help="Leave out tensors that the model has no place for, as 'model.mtp.*'; may be repeated.",
)
@click.option(
    "--calibration",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Choose codes by what `layerpack calibrate` found: the same size, nearer to the source.",
)
@click.option("--keep-source", is_flag=True, help="Keep downloads in the usual Hub cache.")
def convert(
    source: str,
    out: str,
    bits: str,
    block_size: str | None,
    double_quant: bool | None,
    head: str,
    device: str,
    force: bool,
    revision: str | None,
    keep_source: bool,
    zstd: int | None,
    skip: tuple[str, ...],
    calibration: Path | None,
) -> None:
    """Turn the checkpoint SOURCE into a pack at OUT.

    SOURCE is a Hub repository (Qwen/Qwen2.5-72B-Instruct), a local checkpoint directory or a GGUF
    file. After a break, the same command goes on where it was; what is finished is not read again
    (`layerpack verify` reads all of a pack).
    """
    if bits == "16" and (block_size or double_quant is not None or head == "nf4" or calibration):
        raise click.UsageError("--bits 16 quantises nothing; leave the options of NF4 out")
    options = ConvertOptions(
        nf4=bits == "4",
        block_size=None if block_size is None else int(block_size),
        double_quant=double_quant,
        nf4_head=head == "nf4",
        device=device,
        force=force,
        revision=revision,
        keep_source=keep_source,
        zstd_level=zstd,
        skip=skip,
        calibration=calibration,
    )
    start_s = time.monotonic()
    with sign_of_life(f"looking at {printable(source)} …") as life:
        from layerpack.convert.api import convert as run  # seconds of importing

        def announce(work: Remaining) -> None:
            life.over()
            _announce(work)

        with byte_bar("convert") as progress:
            manifest = run(source, out, options, progress, announce=announce)
    source_bytes = sum(file.file_bytes for file in manifest.source.files)
    click.echo(
        f"{out}: {manifest.model.architecture}, {manifest.model.num_layers} layers, "
        f"{human_bytes(manifest.total_bytes)} from {human_bytes(source_bytes)} "
        f"in {time.monotonic() - start_s:.0f} s"
    )


def _announce(work: Remaining) -> None:
    """One line on standard error: what there is to do, and the room that it takes."""
    at_most = "at most " if work.least_pack_bytes < work.pack_bytes else ""
    parts = [f"{at_most}{human_bytes(work.pack_bytes)} of pack to write"]
    if work.download_bytes:
        parts.insert(0, f"{human_bytes(work.download_bytes)} to download")
    if work.scratch_bytes:
        parts.append(f"{human_bytes(work.scratch_bytes)} of scratch space beside it")
    if work.kept_bytes:
        parts.append(f"{human_bytes(work.kept_bytes)} of downloads to keep on the same disk")
    parts.append(f"{human_bytes(work.free_bytes)} free")
    if work.done_blobs:
        parts.insert(0, f"going on, {work.done_blobs} of {work.num_blobs} blobs are done")
    click.echo(f"{work.architecture}, {work.num_layers} layers: {', '.join(parts)}", err=True)
    for note in work.notes:
        click.echo(f"note: {printable(note)}", err=True)
    if work.fits_if_small:
        click.echo(
            "it fits only if compression makes it small enough; if the disk fills up, "
            "make room and run the same command again, it goes on from there",
            err=True,
        )
