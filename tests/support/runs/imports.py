"""Which modules a command imports, found out in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {"torch", "transformers", "numpy", "huggingface_hub", "tqdm", "bitsandbytes"}


def imported_by(*arguments: str) -> tuple[set[str], str]:
    """The modules that `layerpack ARGUMENTS`, which must end well, has imported; and its output."""
    code = (
        "import json, sys\nfrom layerpack.cli.main import main\n"
        f"try: main({list(arguments)!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(json.dumps(list(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1])), done.stdout
