"""Importing torch and transformers in as little time as it can take."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_UNUSED = ("scipy", "sklearn", "soundfile", "soxr", "torchaudio", "torchvision")
"""transformers imports them where they are installed, some with much behind them: seconds, for
nothing that language models or greedy and sampled decoding call."""


@contextmanager
def quick_imports() -> Iterator[None]:
    """The block imports what it needs, no more, and is not interrupted by the collector."""
    with collector_paused(), unused_hidden():
        yield


@contextmanager
def unused_hidden() -> Iterator[None]:
    """In the block, libraries that nothing here uses look as if they were not installed.

    transformers asks once, and remembers.
    """
    hidden = [name for name in _UNUSED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, sys) is None:
                del sys.modules[name]


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection in the block, which should import much and throw away little.

    An import makes some 600,000 objects that live as long as the process. The collector looks
    through all of them again and again, in vain: a quarter of the time of importing. What the
    block leaves it never looks at: it would do so at once, for a third of a second.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def leave_to_the_system() -> None:
    """Before the end of the process: spare the interpreter a last search for garbage."""
    gc.freeze()
