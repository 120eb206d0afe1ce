"""`layerpack verify OUT`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from layerpack.cli.progress import byte_bar
from layerpack.formats.errors import PackError
from layerpack.formats.units import human_bytes


@click.command()
@click.argument("pack", metavar="OUT", type=click.Path(path_type=Path))
def verify(pack: Path) -> None:
    """Re-read the pack OUT and check every byte of it.

    Each file that differs is named, with how: missing, size, header, digest. Reads go past the
    page cache where the system allows it, so that the disk is checked.
    """
    from layerpack.formats.verify import verify_pack

    start_s = time.monotonic()
    with byte_bar("verify") as progress:
        found = verify_pack(pack, progress)
    if found.differences:
        for difference in found.differences:
            click.echo(f"{pack / difference.file}: {difference.text}")
        raise PackError(
            f"{pack}: {len(found.differences)} of {found.num_files} files differ; "
            "restore them or convert again"
        )
    seconds = time.monotonic() - start_s
    click.echo(
        f"{pack}: {found.num_files} files, {human_bytes(found.checked_bytes)}, as they were "
        f"written; {seconds:.1f} s, {found.checked_bytes / 1e9 / max(seconds, 1e-9):.2f} GB/s"
    )
