"""What to expect of a card and a disk that are not here: the planner's own figures, as Markdown.

    python benchmarks/expected.py [--model qwen2.5-72b] [--context 4096]

Nothing is measured and no weights are written: the pack is described from the model's shapes by the
format's own layout, and the planner is asked as `layerpack plan --assume-…` asks it. The link and
disk bandwidths are stated ones. A pass gives one token, or checks many.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from parts.pack_shape import BlobShape, blob_shapes, manifest_of
from parts.shapes import SHAPES

from layerpack.formats.blob.layout import layout_blob
from layerpack.formats.manifest.facts import Blob
from layerpack.formats.pack import Pack
from layerpack.formats.units import human_bytes
from layerpack.runtime.machine.machine import Machine
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Plan, Tier
from layerpack.runtime.planning import FREE_SHARE, plan_for

GB = 1_000_000_000
FREE_VRAM_SHARE = 0.94
"""Of a card's memory: the system, its display and CUDA itself hold the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU as it is sold, and the link that it usually has."""

    vram_bytes: int
    link: str
    link_gb_s: float


CARDS = (
    Card(vram_bytes=8 * GB, link="PCIe 4 x8", link_gb_s=13.0),
    Card(vram_bytes=12 * GB, link="PCIe 4 x16", link_gb_s=25.0),
    Card(vram_bytes=16 * GB, link="PCIe 4 x16", link_gb_s=25.0),
    Card(vram_bytes=24 * GB, link="PCIe 4 x16", link_gb_s=25.0),
)
DISKS = {"Gen3": 3.5, "Gen4": 6.0, "Gen5": 12.0}
MEMORIES_BYTES = (16 * GB, 32 * GB, 64 * GB)


def describe_pack(model: str, path: Path) -> Pack:
    """The pack that `make_pack` would write, of which only config.json is written."""
    config = SHAPES[model]
    (path / "config.json").write_text(json.dumps(config))
    blobs = [_blob(shape) for shape in blob_shapes(config)]
    return Pack(path=path, manifest=manifest_of(config, model, blobs))


def _blob(shape: BlobShape) -> Blob:
    layout = layout_blob(shape.specs)
    return Blob(
        role=shape.role,
        layer=shape.layer,
        file=shape.file,
        file_bytes=layout.file_bytes,
        digest="",
        tensors=layout.tensors,
        nf4=shape.states(0.05),
    )


def plan_card(
    pack: Pack, card: Card, memory_bytes: int, disk_gb_s: float, context_tokens: int
) -> Plan:
    """The plan for one machine."""
    machine = Machine(
        device="assumed",
        vram_free_bytes=int(card.vram_bytes * FREE_VRAM_SHARE),
        host_free_bytes=int(memory_bytes * FREE_SHARE),
        host_total_bytes=memory_bytes,
        link_gb_s=card.link_gb_s,
        disk_gb_s=disk_gb_s,
    )
    return plan_for(machine, pack, OpenOptions(context_tokens=context_tokens))


def table(pack: Pack, context_tokens: int) -> str:
    """A row for each card and memory; seconds per pass for each disk, `*`: bound by the link."""
    header = ["VRAM", "link", "RAM", "layers in VRAM / RAM / disk"]
    header += [f"{name} disk, {gb_s} GB/s" for name, gb_s in DISKS.items()]
    rows = [header, ["---"] * len(header)]
    for card in CARDS:
        for memory_bytes in MEMORIES_BYTES:
            plans = [
                plan_card(pack, card, memory_bytes, gb_s, context_tokens) for gb_s in DISKS.values()
            ]
            counts = " / ".join(str(len(plans[0].slices_in(tier))) for tier in Tier)
            rows.append(
                [
                    f"{card.vram_bytes // GB} GB",
                    f"{card.link}, {card.link_gb_s:.0f} GB/s",
                    f"{memory_bytes // GB} GB",
                    counts,
                    *(_seconds(found) for found in plans),
                ]
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _seconds(found: Plan) -> str:
    if not found.streamed_bytes:
        return "all in VRAM"
    return f"{found.pass_s:.2f} s{'*' * (found.link_s >= found.disk_s)}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen2.5-72b")
    parser.add_argument("--context", type=int, default=4096)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pack = describe_pack(arguments.model, Path(folder))
        whole = plan_card(pack, CARDS[-1], MEMORIES_BYTES[-1], 1.0, arguments.context)
        moved = sum(part.length_bytes for part in whole.slices)
        print(
            f"Computed by the planner, not measured: seconds per pass of {arguments.model} "
            f"({human_bytes(moved)} of weights in {len(whole.slices)} layers and parts of lm_head, "
            f"KV cache for {arguments.context} tokens) from the stated bandwidths; "
            f"{FREE_VRAM_SHARE:.0%} of the VRAM and {FREE_SHARE:.0%} of the RAM free before. "
            "`*`: bound by the link, else by the disk.\n"
        )
        print(table(pack, arguments.context))


if __name__ == "__main__":
    main()
