"""`layerpack generate`: from a prompt to words on standard output."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import click

from layerpack.cli.options.memory import memory_options
from layerpack.cli.options.prompt import (
    as_utf8,
    read_prompt,
    refuse_second_prompt,
    template_option,
)
from layerpack.cli.options.sampling import sampling_options
from layerpack.cli.quick_imports import quick_imports
from layerpack.cli.sign_of_life import sign_of_life
from layerpack.formats.text import printable


@click.command()
@click.argument("pack", metavar="OUT", type=click.Path())
@click.option("--prompt", help="What to answer. Without it: --prompt-file, or standard input.")
@click.option(
    "--prompt-file",
    type=click.Path(),
    help="Read the prompt from a file.",
)
@click.option("--system", help="System message, put before the prompt.")
@template_option
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without chat template.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Stop after so many tokens.",
)
@sampling_options
@memory_options
@click.option(
    "--draft",
    metavar="PATH_OR_REPO",
    help="A small model of the same family (checkpoint, Hub repository or pack), held in VRAM as a "
    "whole, that proposes tokens: same text in fewer passes.",
)
@click.option(
    "--draft-tokens",
    type=click.IntRange(1),
    help="Tokens that the draft proposes per pass, as a tree. [default: as many as cost nothing, "
    "up to 256, in trees as deep as measured times say]",
)
@click.option(
    "--prompt-lookup",
    type=click.IntRange(1),
    metavar="N",
    help="Try N tokens a pass that the text so far suggests, beside a draft's or alone. "
    "[default: 8 where a GPU waits for weights]",
)
@click.option("--no-prompt-lookup", is_flag=True, help="Try none of them.")
@click.option(
    "--same-bits",
    is_flag=True,
    help="Compute single tokens of a model that lies in VRAM as a whole as it does many at a time, "
    "so that proposals change no bit. Others do anyway.",
)
@click.option("--profile", is_flag=True, help="Print where the time of each pass went.")
@click.option(
    "--profile-trace",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write when each thread and stream did what, for ui.perfetto.dev.",
)
@click.option("--verify", is_flag=True, help="Check every byte of the pack before.")
@click.option("-v", "--verbose", is_flag=True, help="Print the plan first.")
def generate(pack: str, prompt: str | None, prompt_file: str | None, **options: Any) -> None:
    """Generate text with the pack OUT, streaming what does not fit into VRAM.

    The text goes to standard output as it comes, a summary line to standard error.
    """
    options["began_s"] = time.perf_counter()
    if options["raw"] and options["system"] is not None:
        raise click.UsageError("--system goes into the chat template, which --raw leaves out")
    if options["raw"] and options["template_arguments"]:
        raise click.UsageError("--template-arg is for the chat template, which --raw leaves out")
    if options["prompt_lookup"] is not None and options["no_prompt_lookup"]:
        raise click.UsageError("give --prompt-lookup or --no-prompt-lookup, not both")
    text = read_prompt(prompt, prompt_file)
    if options["system"] is not None:
        as_utf8(options["system"], "--system")
    with contextlib.ExitStack() as starting, sign_of_life("importing …") as life:
        starting.enter_context(quick_imports())
        from layerpack.cli.runs.generate import run  # after the usage is known to be right: slow

        def on_open() -> None:
            starting.close()
            refuse_second_prompt(prompt, prompt_file)  # a pipe may have been slow

        life.say(f"opening {printable(pack)} …")
        raise SystemExit(run(Path(pack), text, options, life, on_open=on_open))
