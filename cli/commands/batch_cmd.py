"""`layerpack batch`: a file of requests to a file of answers, many on each pass."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from layerpack.cli.options.memory import memory_options
from layerpack.cli.options.requests import default_tokens_option
from layerpack.cli.quick_imports import quick_imports
from layerpack.cli.sign_of_life import sign_of_life
from layerpack.formats.text import printable


@click.command()
@click.argument("pack", metavar="OUT", type=click.Path())
@click.argument("requests", required=False, type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="A text with a prompt on each line, instead of a file of requests.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The results, appended as answers are whole; what is there is not asked again.",
)
@click.option("--system", help="With --prompts: a system message before each.")
@default_tokens_option
@click.option(
    "--temperature",
    type=click.FloatRange(0, 100),
    help="With --prompts: 0 always takes the likeliest token. [default: 0]",
)
@click.option(
    "--sequences",
    type=click.IntRange(1),
    help="Answers at a time, each with the whole --context. [default: as many as memory allows]",
)
@memory_options
def batch(pack: str, requests: Path | None, **options: Any) -> None:
    """Answer the REQUESTS of a file in OpenAI's batch format (JSON lines) with the pack OUT.

    Answers share the passes, so a hundred take little longer than one. The same command goes on
    after any break with what is missing.
    """
    if (requests is None) == (options["prompts"] is None):
        raise click.UsageError("give a file of requests, or --prompts with a text")
    if options["prompts"] is None and (
        options["system"] is not None or options["temperature"] is not None
    ):
        raise click.UsageError("--system and --temperature go with --prompts alone")
    with contextlib.ExitStack() as starting, sign_of_life("importing …") as life:
        starting.enter_context(quick_imports())
        from layerpack.cli.runs.batch import run  # late: needs torch

        life.say(f"opening {printable(pack)} …")
        raise SystemExit(run(Path(pack), requests, options, life, on_open=starting.close))
