"""From the start of a process to its first token, and what of that is importing libraries.

    python benchmarks/startup.py /data/random-72b --vram 8GiB

The pack should be in the page cache. Every figure comes from a fresh process. Ends in JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from layerpack.formats.pack import Pack

_IMPORTS = """
import json, sys, time
begin_s = time.perf_counter()
import torch
torch_s = time.perf_counter()
import transformers
getattr(transformers, sys.argv[1])
transformers_s = time.perf_counter()
import logging
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
import bitsandbytes
bitsandbytes_s = time.perf_counter()
if torch.cuda.is_available():
    torch.zeros(1, device="cuda")
print(json.dumps({
    "import torch s": torch_s - begin_s,
    "import transformers' model class s": transformers_s - torch_s,
    "import bitsandbytes s": bitsandbytes_s - transformers_s,
    "CUDA context s": time.perf_counter() - bitsandbytes_s,
}))
"""


def import_times(architecture: str) -> dict[str, float]:
    """Seconds of each import, one after the other in a process that does nothing else."""
    begin_s = time.perf_counter()
    done = _run([sys.executable, "-c", _IMPORTS, architecture])
    whole_s = time.perf_counter() - begin_s
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    times["rest of the process s"] = whole_s - sum(times.values())
    return {name: round(seconds, 2) for name, seconds in times.items()}


def first_token(path: Path, *, vram: str | None, runs: int) -> dict[str, Any]:
    """Seconds from the start of a process to its end after one token, and what it says of itself.

    `-v` makes it say how long its own set-up took, and which part of that was importing.
    """
    command = [sys.executable, "-m", "layerpack.cli.main", "generate", str(path), "--raw"]
    command += ["--prompt", "Hello, world", "--max-new-tokens", "1", "-v"]
    command += ["--vram", vram] if vram else []
    found = []
    for _ in range(runs):
        begin_s = time.perf_counter()
        done = _run(command)
        found.append((time.perf_counter() - begin_s, done.stderr.strip().splitlines()[-12:]))
    found.sort(key=lambda one: one[0])
    median_s, said = found[len(found) // 2]
    return {
        "median_s": round(median_s, 2),
        "all_s": [round(seconds, 2) for seconds, _ in found],
        "said": said,
    }


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RuntimeError(f"{' '.join(command[:4])} … ended with {done.returncode}: {last}")
    return done


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--vram", help="as for `layerpack generate`")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    architecture = Pack.open(arguments.pack).manifest.model.architecture
    result = {
        "first token": first_token(arguments.pack, vram=arguments.vram, runs=arguments.runs),
        "imports": import_times(architecture),
    }
    for name, value in result.items():
        print(f"{name}: {json.dumps(value, indent=1)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
