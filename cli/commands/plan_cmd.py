"""`layerpack plan OUT`: where the layers of a pack would live, and what a pass would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerpack.cli.options.memory import limits_of, memory_options
from layerpack.cli.options.numbers import POSITIVE
from layerpack.cli.options.sizes import SIZE


@click.command()
@click.argument("pack", metavar="OUT", type=click.Path(path_type=Path))
@memory_options
@click.option(
    "--sequences",
    type=click.IntRange(1),
    metavar="N",
    help="Plan for N answers at a time, each with the whole --context.",
)
@click.option("--layers", is_flag=True, help="One line for each layer.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, every layer in it.")
@click.option("--refresh", is_flag=True, help="Measure link and disk again.")
@click.option("--assume-vram", type=SIZE, help="Plan for a GPU with so much free VRAM.")
@click.option(
    "--assume-ram", type=SIZE, help="Plan for so much memory, a fifth of it taken by others."
)
@click.option(
    "--assume-link", type=POSITIVE, metavar="GB_S", help="Plan for this host-to-GPU link."
)
@click.option("--assume-disk", type=POSITIVE, metavar="GB_S", help="Plan for a disk this fast.")
def plan(pack: Path, sequences: int | None, layers: bool, as_json: bool, **options: Any) -> None:
    """Show where the layers of the pack OUT would live, and how long a pass would take.

    Link and disk are measured once (about a second) and remembered. With the --assume options
    the plan is for a machine that is not here; what is not assumed is measured.
    """
    import json

    from layerpack.formats.pack import Pack
    from layerpack.runtime.core.patience import Patience
    from layerpack.runtime.open_options import DEFAULT_CONTEXT_TOKENS, OpenOptions
    from layerpack.runtime.plan.text import plan_facts, plan_text
    from layerpack.runtime.planning import Assumed, assumed_machine, plan_for

    assumed = Assumed(
        vram_bytes=options["assume_vram"],
        ram_bytes=options["assume_ram"],
        link_gb_s=options["assume_link"],
        disk_gb_s=options["assume_disk"],
    )
    how = OpenOptions(
        device=options["device"],
        limits=limits_of(options),
        context_tokens=options["context"],
        kv_tokens=sequences and sequences * (options["context"] or DEFAULT_CONTEXT_TOKENS),
        refresh=options["refresh"],
    )
    opened = Pack.open(pack)
    machine = assumed_machine(opened, how, assumed, Patience())
    chosen = plan_for(machine, opened, how)
    if as_json:
        facts = plan_facts(chosen, machine) | {"assumed": assumed.names()}
        click.echo(json.dumps(facts, indent=1))
        return
    click.echo(plan_text(chosen, machine, each_layer=layers))
    if sequences and chosen.pass_s:
        click.echo(
            f"{sequences} answers at a time: {sequences / chosen.pass_s:.1f} tokens/s in all, "
            "while computing takes no longer than the weights"
        )
    if names := assumed.names():
        click.echo(f"computed, not measured: {', '.join(names)} as assumed")
