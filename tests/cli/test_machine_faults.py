"""What the machine lacks is said, not blamed on the file in its way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from layerpack.formats.machine_faults import machine_fault

pytest.importorskip("resource")

COMMANDS = {
    "generate": ["--prompt", "hello", "--max-new-tokens", "2", "--device", "cpu"],
    "verify": [],
    "inspect": [],
    "plan": [],
}
LIMITED = (
    "import resource, sys\n"
    "limit = int(sys.argv.pop(1))\n"
    "resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))\n"
    "from layerpack.cli.main import main\n"
    "main()\n"
)


@pytest.mark.parametrize("command", COMMANDS)
def test_too_few_open_files_are_called_so(command: str, pack_of: Callable[..., Path]) -> None:
    """Each limit is enough, or is what is said to be the matter."""
    said = set()
    for limit in (8, 9, 10, 40):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                LIMITED,
                str(limit),
                command,
                pack_of("llama"),
                *COMMANDS[command],
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        last = (done.stderr.splitlines() or [""])[-1]
        if done.returncode:
            assert "too many files are open" in last, done.stderr
            assert ".safetensors" not in last and "config.json" not in last
        said.add(done.returncode)
    assert 0 in said


def test_the_cause_is_found_behind_what_it_led_to() -> None:
    try:
        try:
            raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")
        except OSError:
            raise RuntimeError("the pack is broken")  # noqa: B904 - as libraries do
    except RuntimeError as reason:
        assert "set TMPDIR" in str(machine_fault(reason))
        assert machine_fault(ValueError("x")) is None
