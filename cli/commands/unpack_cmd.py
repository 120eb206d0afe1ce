"""`layerpack unpack PACK OUT`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from layerpack.cli.progress import byte_bar
from layerpack.formats.units import human_bytes


@click.command()
@click.argument("pack", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path())
@click.option("--force", is_flag=True, help="Replace OUT if it is a pack.")
def unpack(pack: Path, out: str, force: bool) -> None:
    """Expand the compressed pack PACK to a plain one at OUT.

    OUT is what `layerpack convert` without --zstd writes, bit for bit; transformers loads it.
    """
    from layerpack.convert.unpack import unpack as run

    start_s = time.monotonic()
    with byte_bar("unpack") as progress:
        manifest = run(pack, out, progress, force=force)
    click.echo(f"{out}: {human_bytes(manifest.total_bytes)} in {time.monotonic() - start_s:.1f} s")
