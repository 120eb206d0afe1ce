"""What answers have whose requests do not say: for the commands that take OpenAI's requests."""

from __future__ import annotations

import click

default_tokens_option = click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="The most of an answer whose request does not say.",
)
