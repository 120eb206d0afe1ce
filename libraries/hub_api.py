"""huggingface_hub: its HTTP library's errors, its bars' positions, and hf_xet below it."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_CHECK_EVERY_S = 0.2


def http() -> Any:
    """The HTTP library that huggingface_hub uses: httpx in its version 1, httpx2 in version 2."""
    from huggingface_hub.errors import HfHubHTTPError

    return importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])


def status_of(reason: BaseException | None) -> int | None:
    """The status of the answer that the error is about; None if it is about none."""
    response = getattr(reason, "response", None)
    return None if response is None else int(response.status_code)


def range_of(repo: str, name: str, revision: str, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file, or as many as came. Raises what its HTTP library does."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(repo, name, revision=revision)
    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
        hf_raise_for_status(answer)
        first = 0 if answer.status_code == 200 else begin  # a server may send all
        content = bytearray()
        for piece in answer.iter_bytes():
            content += piece
            if first + len(content) >= end:
                break
    return bytes(content[begin - first : end - first])


def progress_class(reach: Callable[[int], None]) -> type[Any]:
    """A class for huggingface_hub to use in tqdm's place: draws nothing, and calls `reach`.

    `reach(position_bytes)`: the download stands at this byte, or has begun anew at it.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, initial: int = 0, **options: Any) -> None:
            super().__init__(  # type: ignore[no-untyped-call]
                *args, **{**options, "initial": initial, "disable": True}
            )
            self.position_bytes = initial

        def update(self, n: float | None = 1) -> None:
            self.position_bytes += int(n or 0)
            reach(self.position_bytes)

    return Bar


@contextmanager
def xet_ended_by(check: Callable[[], None]) -> Iterator[None]:
    """In the block, `check` is called often, in a thread; if it raises, hf_xet gives up at once.

    hf_xet, which fetches most large files, tries again by itself for a minute and a half, in
    threads of its own. What `check` raises is left to the caller's own call of it.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_CHECK_EVERY_S):
            try:
                check()
            except BaseException:
                abort_xet()
                return

    thread = threading.Thread(target=watch, name="layerpack-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def is_xet_error(reason: BaseException) -> bool:
    """Whether hf_xet raised it, a plain RuntimeError: there is no Python below the Hub's own."""
    frame = reason.__traceback__
    if type(reason) is not RuntimeError or frame is None:
        return False
    while frame.tb_next is not None:
        frame = frame.tb_next
    return str(frame.tb_frame.f_globals.get("__name__", "")).startswith("huggingface_hub.")


def abort_xet() -> None:
    """End what hf_xet downloads."""
    with contextlib.suppress(ImportError):  # hf_xet is not installed everywhere
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()  # type: ignore[no-untyped-call]
