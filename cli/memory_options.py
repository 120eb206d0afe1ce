"""What a run may use of the machine: one definition of the options for every command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from layerpack.cli.sizes import SIZE

if TYPE_CHECKING:
    from layerpack.runtime.plan import Limits

_Command = TypeVar("_Command", bound=Callable[..., Any])
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
vram_option = click.option("--vram", type=SIZE, help="Most VRAM to use in all, as 8GiB or 7500MB.")
ram_option = click.option("--ram", type=SIZE, help="Most host memory to keep weights in.")
_OPTIONS = (
    device_option,
    vram_option,
    ram_option,
    click.option(
        "--vram-layers",
        type=click.IntRange(0),
        metavar="N",
        help="Keep N layers in VRAM (parts of lm_head count as layers).",
    ),
    click.option(
        "--host-layers", type=click.IntRange(0), metavar="N", help="Keep N layers in host memory."
    ),
    click.option("--context", type=click.IntRange(1), help="Tokens to set memory aside for."),
    click.option(
        "--slots",
        type=click.IntRange(2, 16),
        default=3,
        show_default=True,
        help="Layers in flight on the device.",
    ),
)


def memory_options(command: _Command) -> _Command:
    """Adds them; `limits_of` reads all but --device and --context."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def limits_of(options: Mapping[str, Any]) -> Limits:
    """The planner's limits. Imports torch."""
    from layerpack.runtime.plan import Limits

    return Limits(
        vram_bytes=options["vram"],
        ram_bytes=options["ram"],
        num_slots=options["slots"],
        vram_slices=options["vram_layers"],
        host_slices=options["host_layers"],
    )
