"""`layerpack convert SOURCE OUT`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from layerpack.convert.options import ConvertOptions
from layerpack.formats.nf4 import BLOCK_SIZES
from layerpack.formats.units import human_bytes


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
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
@click.option("--force", is_flag=True, help="Replace OUT, and unfinished work of other options.")
@click.option("--revision", help="Branch, tag or commit of a Hub repository.")
@click.option(
    "--zstd",
    type=click.IntRange(1, 22),
    metavar="LEVEL",
    help="Compress the pack, without loss: 3 % on NF4, 30 % on 16-bit parts. 1 will do.",
)
@click.option("--keep-source", is_flag=True, help="Keep downloads in the usual Hub cache.")
def convert(
    source: str,
    out: Path,
    block_size: str | None,
    double_quant: bool | None,
    head: str,
    device: str,
    force: bool,
    revision: str | None,
    keep_source: bool,
    zstd: int | None,
) -> None:
    """Turn the checkpoint SOURCE into a pack at OUT.

    SOURCE is a Hub repository (Qwen/Qwen2.5-72B-Instruct), a local checkpoint directory or a GGUF
    file. After a break, the same command goes on where it was.
    """
    from tqdm import tqdm

    from layerpack.convert.api import convert as run

    options = ConvertOptions(
        block_size=None if block_size is None else int(block_size),
        double_quant=double_quant,
        nf4_head=head == "nf4",
        device=device,
        force=force,
        revision=revision,
        keep_source=keep_source,
        zstd_level=zstd,
    )
    start_s = time.monotonic()
    with tqdm(desc="convert", unit="B", unit_scale=True, leave=False) as bar:

        def progress(done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)

        manifest = run(source, out, options, progress)
    source_bytes = sum(file.file_bytes for file in manifest.source.files)
    click.echo(
        f"{out}: {manifest.model.architecture}, {manifest.model.num_layers} layers, "
        f"{human_bytes(manifest.total_bytes)} from {human_bytes(source_bytes)} "
        f"in {time.monotonic() - start_s:.0f} s"
    )
