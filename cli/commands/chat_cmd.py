"""`layerpack chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from layerpack.cli.options.memory import memory_options
from layerpack.cli.options.prompt import template_option
from layerpack.cli.options.sampling import sampling_options
from layerpack.cli.quick_imports import quick_imports
from layerpack.cli.sign_of_life import sign_of_life
from layerpack.formats.text import printable


@click.command()
@click.argument("pack", metavar="OUT", type=click.Path())
@click.option("--system", help="System message, put before the conversation.")
@click.option(
    "--load",
    type=click.Path(path_type=Path),
    help="Go on with a conversation that /save wrote.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="The most of an answer.",
)
@sampling_options
@template_option
@click.option("--draft", metavar="PATH_OR_REPO", help="As for `generate`.")
@memory_options
def chat(pack: str, **options: Any) -> None:
    """Talk with the pack OUT: each turn goes on from the keys and values of those before.

    A line that ends with a backslash goes on. /help lists the commands. Ctrl-C ends an answer, not
    the conversation. In a pipe each line is a turn.
    """
    with contextlib.ExitStack() as starting, sign_of_life("importing …") as life:
        starting.enter_context(quick_imports())
        from layerpack.cli.runs.chat import run  # late: needs torch

        life.say(f"opening {printable(pack)} …")
        raise SystemExit(run(Path(pack), options, life, on_open=starting.close))
