"""What a run may use of the machine: one definition of the options for every command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from layerpack.cli.options.sizes import SIZE

if TYPE_CHECKING:
    from layerpack.runtime.plan.plan import Limits

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _not_of_a_cpu(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """The value. Raises click.UsageError if VRAM is asked for where `--device cpu` is, too."""
    # No VRAM at all is what a CPU has.
    if value and context.params["device"].partition(":")[0] == "cpu":
        raise click.UsageError(f"{option.opts[0]}: --device cpu has no VRAM; leave one of them out")
    return value


device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    is_eager=True,  # known when the others are looked at
    help="auto, cpu, cuda or cuda:N.",
)
vram_option = click.option(
    "--vram",
    type=SIZE,
    callback=_not_of_a_cpu,
    help="Most VRAM to use in all, as 8GiB or 7500MB; a CPU uses none.",
)
ram_option = click.option("--ram", type=SIZE, help="Most host memory to keep weights in.")
_OPTIONS = (
    device_option,
    vram_option,
    ram_option,
    click.option(
        "--vram-layers",
        type=click.IntRange(0),
        callback=_not_of_a_cpu,
        metavar="N",
        help="Keep N layers in VRAM (parts of lm_head count as layers).",
    ),
    click.option(
        "--host-layers", type=click.IntRange(0), metavar="N", help="Keep N layers in host memory."
    ),
    click.option(
        "--context",
        type=click.IntRange(1),
        help="Tokens of prompt and answer to set memory aside for (default: what the run can need; "
        "of `plan`: 4096).",
    ),
    click.option(
        "--slots",
        type=click.IntRange(2, 16),
        default=3,
        show_default=True,
        help="Layers in flight on the device; on a CPU 2 at most.",
    ),
)


def memory_options(command: _Command) -> _Command:
    """Adds them; `limits_of` reads all but --device and --context."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def limits_of(options: Mapping[str, Any]) -> Limits:
    """The planner's limits. Imports torch."""
    from layerpack.runtime.plan.plan import Limits

    return Limits(
        vram_bytes=options["vram"],
        ram_bytes=options["ram"],
        num_slots=options["slots"],
        vram_slices=options["vram_layers"],
        host_slices=options["host_layers"],
    )
