"""`layerpack serve`: a pack over HTTP, for many clients at once."""

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
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0: everywhere."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="The port; 0: any that is free.",
)
@click.option(
    "--api-key",
    envvar="LAYERPACK_API_KEY",
    help="Answer only to who knows it (better given as LAYERPACK_API_KEY).",
)
@click.option("--name", help="What the model is called. [default: the name of OUT]")
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages from there ask, too; may be repeated.",
)
@default_tokens_option
@click.option(
    "--max-waiting",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Requests in the queue; more are sent away.",
)
@click.option(
    "--max-body",
    "max_body_bytes",
    type=click.IntRange(1024),
    default=8 << 20,
    show_default=True,
    help="Most bytes of a request.",
)
@click.option(
    "--grace",
    "grace_s",
    type=click.IntRange(0),
    default=60,
    show_default=True,
    help="Seconds to finish answers in when told to end.",
)
@click.option(
    "--sequences",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Answers at a time, each with the whole --context; fewer where memory does not allow it.",
)
@click.option("--draft", metavar="PATH_OR_REPO", help="As for `generate`.")
@memory_options
def serve(pack: str, **options: Any) -> None:
    """Serve the pack OUT: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

    Answers share the passes; each is what `generate` gives alone.
    """
    with contextlib.ExitStack() as starting, sign_of_life("importing …") as life:
        starting.enter_context(quick_imports())
        try:
            from layerpack.cli.runs.serve import run  # late: needs torch
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in (
                "starlette",
                "uvicorn",
                "prometheus_client",
            ):
                raise
            raise click.ClickException(
                f"serving needs the package {error.name}; pip install 'layerpack[server]'"
            ) from error
        life.say(f"opening {printable(pack)} …")
        raise SystemExit(run(Path(pack), options, life, on_open=starting.close))
