"""`layerpack calibrate OUT CALIBRATION --text FILE`: what a text says about a model's inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerpack.cli.options.memory import device_option, ram_option, vram_option
from layerpack.cli.sign_of_life import sign_of_life
from layerpack.formats.text import printable


@click.command()
@click.argument("pack", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("calibration", type=click.Path(path_type=Path))
@click.option(
    "--text",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A text in UTF-8, of all kinds that the model is to be good at; 200 kB are enough.",
)
@click.option(
    "--window",
    type=click.IntRange(4),
    default=512,
    show_default=True,
    help="Tokens of a window; the model sees nothing before it.",
)
@click.option("--windows", type=click.IntRange(1), metavar="N", help="At most so many windows.")
@device_option
@vram_option
@ram_option
def calibrate(pack: Path, **options: Any) -> None:
    """Collect what `convert --calibration` chooses better codes by.

    Runs a text through the pack OUT and writes to the directory CALIBRATION how the inputs of each
    linear layer vary together. A pack that is then converted again from its source with
    --calibration is a plain NF4 pack of the same size, nearer to the source. After a break the same
    command goes on where it was.
    """
    with sign_of_life(f"opening {printable(str(pack))} …") as life:
        from layerpack.cli.runs.calibrate import run  # late: seconds of importing

        raise SystemExit(run(pack, options, life))
