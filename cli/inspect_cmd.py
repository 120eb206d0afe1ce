"""`layerpack inspect TARGET`: what is in a pack. Imports neither torch nor transformers for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from layerpack.cli.inspect_json import pack_document
from layerpack.cli.inspect_text import pack_lines, tensor_lines
from layerpack.formats.pack import Pack

LINK_GB_S, DISK_GB_S = 12.0, 6.0
"""What a laptop's GPU on PCIe 4.0 x8 and an NVMe drive on PCIe 4.0 x4 reach, about."""

_SPEED = click.FloatRange(min=0, min_open=True)


@click.command()
@click.argument("target", metavar="OUT")
@click.option("--blobs", "all_blobs", is_flag=True, help="List every blob, like ones too.")
@click.option("--tensors", is_flag=True, help="List every tensor, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes in bytes.")
@click.option(
    "--link",
    "link_gb_s",
    type=_SPEED,
    default=LINK_GB_S,
    show_default=True,
    metavar="GB/S",
    help="Speed from host memory to the GPU, to reckon with.",
)
@click.option(
    "--disk",
    "disk_gb_s",
    type=_SPEED,
    default=DISK_GB_S,
    show_default=True,
    metavar="GB/S",
    help="Speed of the disk, to reckon with.",
)
def inspect(target: str, **options: Any) -> None:
    """Show what is in the pack OUT."""
    pack = Pack.open(Path(target))
    speeds = {key: options[key] for key in ("link_gb_s", "disk_gb_s")}
    if options["as_json"]:
        document = {"kind": "pack", "path": target}
        document |= pack_document(pack.manifest, tensors=options["tensors"], **speeds)
        click.echo(json.dumps(document, indent=1))
        return
    _print(pack_lines(target, pack.manifest, all_blobs=options["all_blobs"], **speeds))
    if options["tensors"]:
        _print(["", *tensor_lines(pack.manifest.blobs)])


def _print(lines: Iterable[str]) -> None:
    click.echo("\n".join(lines))
