"""`layerpack eval OUT`: perplexity of a pack, and how far its text is from a reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerpack.cli.options.memory import device_option, ram_option, vram_option
from layerpack.cli.sign_of_life import sign_of_life
from layerpack.formats.text import printable


@click.command()
@click.argument("pack", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--text",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A text in UTF-8. [default: 64 kB of Alice's Adventures in Wonderland]",
)
@click.option(
    "--window",
    type=click.IntRange(4),
    default=512,
    show_default=True,
    help="Tokens of a window; those of its second half are scored.",
)
@click.option("--windows", type=click.IntRange(1), metavar="N", help="At most so many windows.")
@click.option(
    "--reference",
    metavar="SOURCE",
    help="Compare with this: another pack, or what OUT was made from (a checkpoint directory, a "
    "GGUF file, a Hub repository), which is run in 16 bits.",
)
@click.option(
    "--logits",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The reference's logits: kept here, and used again where they are here already; "
    "--reference can be left out then.",
)
@device_option
@vram_option
@ram_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def eval(pack: Path, **options: Any) -> None:
    """Measure what the text of the pack OUT is worth.

    Perplexity over a text, in windows as llama.cpp's perplexity tool takes them. With a reference
    the KL divergence of each token's distribution from the reference's (mean, median, 99th
    percentile), and how often both hold the same token for the likeliest. Each figure has its
    standard error. Ctrl-C gives what there is.
    """
    with sign_of_life(f"opening {printable(str(pack))} …") as life:
        from layerpack.cli.runs.eval import run  # late: seconds of importing

        raise SystemExit(run(pack, options, life))
