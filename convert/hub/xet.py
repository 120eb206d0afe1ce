"""Downloads that huggingface_hub leaves to hf_xet: how to end one, and which errors are its own.

Most large files on the Hub are fetched so. hf_xet tries again by itself, for a minute and a half,
in threads of its own, and raises a plain RuntimeError in the end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_CHECK_EVERY_S = 0.2


@contextmanager
def ended_by(check: Callable[[], None]) -> Iterator[None]:
    """In the block, `check` is called often, in a thread; if it raises, hf_xet gives up at once.

    What it raises is left to the caller's own call of it.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_CHECK_EVERY_S):
            try:
                check()
            except BaseException:
                _abort()
                return

    thread = threading.Thread(target=watch, name="layerpack-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def is_xet_error(reason: BaseException) -> bool:
    """Whether hf_xet raised it: there is no Python of ours, or of anyone's, below the Hub's."""
    frame = reason.__traceback__
    if type(reason) is not RuntimeError or frame is None:
        return False
    while frame.tb_next is not None:
        frame = frame.tb_next
    return str(frame.tb_frame.f_globals.get("__name__", "")).startswith("huggingface_hub.")


def _abort() -> None:
    with contextlib.suppress(ImportError):  # versions of huggingface_hub that cannot
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()  # type: ignore[no-untyped-call]
