"""From the start of a process to its first token, and what of that is importing libraries.

    python benchmarks/startup.py /data/random-72b --vram 8GiB

The pack should be in the page cache. Every figure comes from a fresh process. Both in the
environment as it is and in one that has layerpack's own dependencies alone. Ends in JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from parts.own_environment import link_own

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


class Interpreter:
    """How to start Python: `command`, and its environment variables."""

    def __init__(self, *, own: Path | None = None) -> None:
        """As it is here; or with nothing but what `own` (see own_environment.py) links to."""
        self.command = [sys.executable] if own is None else [sys.executable, "-S"]
        self.variables = os.environ | ({} if own is None else {"PYTHONPATH": str(own)})


AS_IT_IS = Interpreter()


def measure_startup(path: Path, *, vram: str | None, runs: int) -> dict[str, Any]:
    """Both environments, each with the first token and the imports alone; printed as they come."""
    architecture = Pack.open(path).manifest.model.architecture
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        own = link_own(Path(folder))
        for title, python in (
            ("own dependencies", Interpreter(own=Path(folder))),
            ("as it is", AS_IT_IS),
        ):
            found[title] = {
                "first token": first_token(path, vram=vram, runs=runs, python=python),
                "imports": import_times(architecture, python),
            }
            print(f"{title}: {json.dumps(found[title])}", flush=True)
    return {**found, "own distributions": own}


def import_times(architecture: str, python: Interpreter = AS_IT_IS) -> dict[str, float]:
    """Seconds of each import, one after the other in a process that does nothing else."""
    begin_s = time.perf_counter()
    done = subprocess.run(
        [*python.command, "-c", _IMPORTS, architecture],
        env=python.variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    _refuse_failure(done.returncode, python.command, done.stderr)
    whole_s = time.perf_counter() - begin_s
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    times["rest of the process s"] = whole_s - sum(times.values())
    return {name: round(seconds, 2) for name, seconds in times.items()}


def first_token(
    path: Path, *, vram: str | None, runs: int, python: Interpreter = AS_IT_IS
) -> dict[str, Any]:
    """Seconds from the start of a process to its first output, to its end, and what it says.

    One token is asked for. `-v` makes it say how long its own set-up took, and which part of that
    was importing. One run before is not counted: it compiles what was never imported.
    """
    command = [*python.command, "-m", "layerpack.cli.main", "generate", str(path), "--raw"]
    command += ["--prompt", "Hello, world", "--max-new-tokens", "1", "-v"]
    command += ["--vram", vram] if vram else []
    found = sorted([_first_output(command, python) for _ in range(1 + runs)][1:])
    median_s, end_s, said = found[len(found) // 2]
    return {
        "median_s": round(median_s, 2),
        "all_s": [round(first_s, 2) for first_s, _, _ in found],
        "end_of_process_s": round(end_s, 2),
        "said": said.strip().splitlines()[-12:],
    }


def _first_output(command: list[str], python: Interpreter) -> tuple[float, float, str]:
    """Seconds to the first byte on standard output, to the end, and standard error."""
    with tempfile.TemporaryFile("w+") as errors:
        begin_s = time.perf_counter()
        with subprocess.Popen(
            command, env=python.variables, stdout=subprocess.PIPE, stderr=errors
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            first_s = time.perf_counter() - begin_s
            process.stdout.read()
            process.wait(timeout=120)
        end_s = time.perf_counter() - begin_s
        errors.seek(0)
        said = errors.read()
    _refuse_failure(process.returncode, command, said)
    return first_s, end_s, said


def _refuse_failure(code: int, command: list[str], said: str) -> None:
    if code:
        last = (said.strip().splitlines() or ["no word"])[-1]
        raise RuntimeError(f"{' '.join(command[:4])} … ended with {code}: {last}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--vram", help="as for `layerpack generate`")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    result = measure_startup(arguments.pack, vram=arguments.vram, runs=arguments.runs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
