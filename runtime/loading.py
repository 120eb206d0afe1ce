"""A store that is opened in a thread of its own, while transformers is imported beside it."""

from __future__ import annotations

from collections.abc import Callable

from layerpack.formats.errors import StalledError
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.threads import beside
from layerpack.runtime.stream.store import Store

_JOIN_S = 90.0  # more than the watchdog that ends a read, so its error is the one that is seen


class Loading:
    """begun -result-> store in use -close-> closed; `close` is right at any time."""

    def __init__(self, make: Callable[[], Store], patience: Patience) -> None:
        """Begin to map, register and load; waits not."""
        self._patience = patience
        self._job = beside("open", make)

    def result(self) -> Store:
        """The open store; waits. Raises what opening it raised."""
        return self._job.wait()

    def close(self) -> None:
        """Undo all of it; waits. Raises StalledError if loading is stuck in the kernel."""
        if not self._job.over:
            self._patience.cancel()  # nobody waits for the rest of it
        if not self._job.ended(_JOIN_S):
            raise StalledError(f"loading did not end within {_JOIN_S:.0f} s")
        if not self._job.failed:
            self._job.wait().__exit__(None, None, None)
