"""Weights that are opened in a thread of their own, while transformers is imported beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from layerpack.formats.errors import StalledError
from layerpack.runtime.core.interrupts import deferred_interrupts, start_threads
from layerpack.runtime.network.weights import Weights

_JOIN_S = 90.0  # more than the watchdog that ends a read, so its error is the one that is seen


class Opening:
    """started -result-> weights in use -close-> closed; `close` is right at any time.

    Whatever happens between, Ctrl-C too, `close` ends the loading, joins the thread, and closes
    the weights if there are any.
    """

    def __init__(self, make: Callable[[threading.Event], Weights]) -> None:
        self._make = make
        self._cancelled = threading.Event()
        self._done = threading.Event()
        self._weights: Weights | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="layerpack-open", daemon=True)

    def start(self) -> None:
        """Begin to map, register and load."""
        start_threads(self._thread)

    def result(self) -> Weights:
        """The open weights; waits. Raises what opening them raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        assert self._weights is not None
        return self._weights

    def close(self) -> None:
        """Undo all of it; waits. Raises StalledError if loading is stuck in the kernel."""
        with deferred_interrupts():
            self._cancelled.set()
            if self._thread.ident is None:
                return
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():
                raise StalledError(f"loading did not end within {_JOIN_S:.0f} s")
            weights, self._weights = self._weights, None
            if weights is not None:
                weights.__exit__(None, None, None)

    def _run(self) -> None:
        try:
            self._weights = self._make(self._cancelled)
        except BaseException as error:  # whoever waits must see it, whatever it is
            self._error = error
        finally:
            self._done.set()
