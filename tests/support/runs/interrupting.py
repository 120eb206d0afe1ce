"""A command line that gets a signal in the middle of a stage. For processes of their own."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

from layerpack.cli.main import main
from layerpack.convert import api
from layerpack.convert.nf4.blocks import BlockEncoder
from layerpack.convert.output.destination import Destination
from layerpack.convert.output.journal import Journal
from layerpack.convert.pipeline import pipeline
from layerpack.convert.source.directory import DirectorySource
from layerpack.formats.blob_writer import BlobWriter

STAGES: dict[str, tuple[Any, str, int]] = {
    "open": (api, "open_source", 1),
    "plan": (api, "find_structure", 1),
    "digest": (DirectorySource, "digest", 1),
    "read": (DirectorySource, "read", 40),
    "encode": (BlockEncoder, "encode", 30),
    "finish": (pipeline, "finish_nf4", 30),
    "write": (BlobWriter, "write", 100),
    "journal": (Journal, "blob", 4),
    "small files": (Destination, "write_file", 2),
    "commit": (Destination, "commit", 1),
}
"""Where a stage's work is done, and in which of its calls the signal comes."""


def run_interrupted(stage: str, signal_number: int, arguments: list[str], log: Path) -> None:
    """Run `layerpack ARGUMENTS`, standard error to `log`, and signal this process in the stage."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    owner, name, wanted = STAGES[stage]
    original, calls = getattr(owner, name), itertools.count(1)

    def signalled(*positional: Any, **named: Any) -> Any:
        if next(calls) == wanted:
            os.kill(os.getpid(), signal_number)
            time.sleep(0.05)  # the main thread's handler runs now, wherever that thread is
        return original(*positional, **named)

    setattr(owner, name, signalled)
    main(arguments)
