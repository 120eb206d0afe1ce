"""How tokens are drawn: one definition of the options for every command that talks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from layerpack.cli.options.numbers import SEED, FiniteRange

_Command = TypeVar("_Command", bound=Callable[..., Any])
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
_OPTIONS = (
    click.option(
        "--temperature",
        type=FiniteRange(0),
        default=0.0,
        show_default=True,
        help="0 always takes the likeliest token.",
    ),
    click.option(
        "--top-p",
        type=FiniteRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        help="Sample from the likeliest tokens that have this probability together.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Sample from so many of the likeliest tokens. 0: no limit.",
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        help="Sample from tokens at least this times as likely as the likeliest.",
    ),
    click.option("--seed", type=SEED, help="Makes sampling repeatable."),
)


def sampling_options(command: _Command) -> _Command:
    """Adds them; `sampling_of` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def sampling_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of GenerateOptions that they say."""
    return {name: options[name] for name in SAMPLING}
