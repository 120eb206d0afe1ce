"""`layerpack inspect TARGET`: a pack, a conversion that is not done, or a source of one.

For a pack, and for unfinished work, neither torch nor transformers is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from layerpack.cli.options.numbers import POSITIVE
from layerpack.cli.reports.documents import pack_document
from layerpack.cli.reports.lines import pack_lines, tensor_lines
from layerpack.formats.manifest.facts import MANIFEST_NAME
from layerpack.formats.pack import Pack
from layerpack.formats.text import is_repo_id

LINK_GB_S, DISK_GB_S, DOWNLOAD_MB_S = 12.0, 6.0, 50.0
"""A laptop's GPU on PCIe 4.0 x8, an NVMe drive on PCIe 4.0 x4, a good home line: about so much."""


@click.command()
@click.argument("target")
@click.option("--blobs", "all_blobs", is_flag=True, help="List every blob, like ones too.")
@click.option("--tensors", is_flag=True, help="List every tensor, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes in bytes.")
@click.option(
    "--link",
    "link_gb_s",
    type=POSITIVE,
    default=LINK_GB_S,
    show_default=True,
    metavar="GB/S",
    help="Speed from host memory to the GPU, to reckon with.",
)
@click.option(
    "--disk",
    "disk_gb_s",
    type=POSITIVE,
    default=DISK_GB_S,
    show_default=True,
    metavar="GB/S",
    help="Speed of the disk, to reckon with.",
)
@click.option(
    "--download",
    "download_mb_s",
    type=POSITIVE,
    default=DOWNLOAD_MB_S,
    show_default=True,
    metavar="MB/S",
    help="Speed of the network, to reckon with for a source on the Hub.",
)
@click.option("--revision", help="Branch, tag or commit of a source on the Hub.")
@click.option("--stats", is_flag=True, help="Compare a pack's weights with its source's.")
@click.option("--source", help="With --stats: where the source is, if not where it was.")
def inspect(target: str, **options: Any) -> None:
    """Show what is in a pack, how far a conversion is, or what a source would become.

    TARGET is a pack; the target of a conversion that is not done; or a checkpoint directory, a
    GGUF file or a Hub repository, of which no weights are read.
    """
    path = Path(target)
    if options["source"] and not options["stats"]:
        raise click.UsageError("--source is for --stats")
    if options["stats"] or (path / MANIFEST_NAME).exists():
        _refuse_revision(target, options)
        _show_pack(target, options)
        return
    from layerpack.convert.output.unfinished import find_unfinished, read_unfinished

    partial = find_unfinished(path)
    if partial is not None:
        _refuse_revision(target, options)
        from layerpack.cli.reports.unconverted import unfinished_document, unfinished_lines

        work = read_unfinished(partial)
        _show(unfinished_document(work) if options["as_json"] else unfinished_lines(work))
    elif _is_source(target):
        _show_source(target, options)
    else:
        Pack.open(path)  # says what is wrong


def _refuse_revision(target: str, options: dict[str, Any]) -> None:
    if options["revision"] is not None:
        raise click.UsageError(
            f"--revision is for a source on the Hub, and {target} is on this machine; leave it out"
        )


def _show_pack(target: str, options: dict[str, Any]) -> None:
    pack = Pack.open(Path(target))
    manifest, speeds = pack.manifest, _speeds(options)
    errors = None
    if options["stats"]:
        from layerpack.cli.reports.unconverted import error_lines, error_rows

        errors = error_rows(pack, options["source"])
    if options["as_json"]:
        document = {"kind": "pack", "path": target}
        document |= pack_document(manifest, tensors=options["tensors"], **speeds)
        _show(document if errors is None else {**document, "errors": errors})
        return
    _show(pack_lines(target, manifest, all_blobs=options["all_blobs"], **speeds))
    if errors is not None:
        _show(["", *error_lines(errors)])
    if options["tensors"]:
        _show(["", *tensor_lines(manifest.blobs)])


def _show_source(target: str, options: dict[str, Any]) -> None:
    from layerpack.cli.reports.unconverted import forecast_document, forecast_lines
    from layerpack.convert.options import ConvertOptions

    wanted = ConvertOptions(revision=options["revision"])
    how = {"download_mb_s": options["download_mb_s"], **_speeds(options)}
    if options["as_json"]:
        _show(forecast_document(target, wanted, tensors=options["tensors"], **how))
    else:
        _show(list(forecast_lines(target, wanted, all_blobs=options["all_blobs"], **how)))


def _speeds(options: dict[str, Any]) -> dict[str, float]:
    return {key: options[key] for key in ("link_gb_s", "disk_gb_s")}


def _is_source(target: str) -> bool:
    """Whether it is a checkpoint here, or can be the name of one on the Hub."""
    path = Path(target).expanduser()
    if path.exists() or target.endswith(".gguf"):
        return not path.is_dir() or (path / "config.json").is_file()
    owner, slash, _ = target.partition("/")
    return is_repo_id(target) and slash != "" and not Path(owner).exists()


def _show(what: Iterable[str] | dict[str, Any]) -> None:
    if isinstance(what, dict):
        click.echo(json.dumps(what, indent=1))
    else:
        click.echo("\n".join(what))
