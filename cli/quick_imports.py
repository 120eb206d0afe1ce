"""Importing torch and transformers with the garbage collector out of the way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection in the block, which should import much and throw away little.

    An import makes some 600,000 objects that live as long as the process. The collector looks
    through all of them again and again, in vain: a quarter of the time of importing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def leave_to_the_system() -> None:
    """Before the end of the process: spare the interpreter a last search for garbage."""
    gc.freeze()
