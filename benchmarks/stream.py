"""How close a pass comes to the links' limits: every tier, on the machine at hand, in one run.

    python benchmarks/make_pack.py qwen2.5-72b /data/random-72b
    python benchmarks/stream.py /data/random-72b --vram 8GiB --json result.json

Each ratio's limit is measured in the same run: the link by copies alone from registered mappings,
the disk by whole passes of reads alone in the best of six ways, two before the disk tier and two
after, as disks drift: their median. Passes are transformers' whole forward (attention over a cache
of --context tokens, norms, lm_head). Medians, with the least and the most beside them. About 10
minutes for 38.7 GB a pass at 50 GB/s link and 1.9 GB/s disk; a step that fails says so under its
name, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from parts.stream_run import Run, cap_vram
from parts.stream_steps import STEPS


def run_steps(run: Run, names: list[str], *, on_step: Callable[[], None]) -> None:
    """Each step in turn; an error becomes the step's figure. `on_step` is called after each."""
    for name in names:
        run.say(name)
        begin_s = time.perf_counter()
        try:
            STEPS[name](run)
        except Exception as error:  # whatever it is, the other figures are wanted
            run.note(f"error in {name}", f"{type(error).__name__}: {' '.join(str(error).split())}")
        run.result.setdefault("seconds by step", {})[name] = round(time.perf_counter() - begin_s, 1)
        gc.collect()
        torch.cuda.empty_cache()
        on_step()
    run.say("end")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--vram", default="8GiB", help="cap for the whole process")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--draft", type=Path, help="a pack for the step `drafted`")
    parser.add_argument("--disk-seconds", type=float, default=1.0, help="of each of six probes")
    parser.add_argument("--only", default="", help=f"steps to take, of {','.join(STEPS)}")
    parser.add_argument("--skip", default="", help="steps to leave out")
    parser.add_argument("--json", type=Path, help="written after each step")
    arguments = parser.parse_args()
    only, skip = (set(filter(None, text.split(","))) for text in (arguments.only, arguments.skip))
    if unknown := (only | skip) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    run = Run(arguments)
    cap_vram(run.vram)

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(run.result, indent=1))

    run_steps(
        run, [name for name in STEPS if name in (only or STEPS) and name not in skip], on_step=save
    )
    print(json.dumps(run.result))


if __name__ == "__main__":
    main()
