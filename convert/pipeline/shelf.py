"""Which source files are at hand: fetched a little ahead of need, released after their last use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from layerpack.convert.pipeline.crew import Crew
from layerpack.convert.source.protocol import Source


class Shelf:
    """Life of a file: NAMED -fetch-> READABLE -last use, and digest taken-> RELEASED

    `uses` are the files of each blob, in the order in which blobs are converted. At most
    `source.max_held_files` are held, more only where a single blob needs more.
    """

    def __init__(
        self,
        crew: Crew,
        source: Source,
        uses: Sequence[Sequence[str]],
        undigested: Iterable[str],
        *,
        report: Callable[[int], None],
        note_digest: Callable[[str, str], None],
    ) -> None:
        self._crew, self._source = crew, source
        self._report, self._note_digest = report, note_digest
        self._left = Counter(file for files in uses for file in files)
        self._first_use = {
            file: i for i, files in reversed(list(enumerate(uses))) for file in files
        }
        self._undigested = set(undigested)
        self._held: set[str] = set()
        self._readable: set[str] = set()
        self._current = 0

    def fetch_all(self) -> None:
        """The fetch thread: every file, in the order of first use. Raises StoppedError."""
        only_digests = sorted(self._undigested - self._first_use.keys())
        for file in [*sorted(self._first_use, key=self._first_use.__getitem__), *only_digests]:
            self._take_turn(file)
            self._source.fetch(file, self._checked_report)
            with self._crew.condition:
                self._readable.add(file)
                self._crew.condition.notify_all()
            if file in self._undigested:
                self._note_digest(file, self._source.digest(file, self._crew.check))
            with self._crew.condition:
                self._undigested.discard(file)
                self._release_if_done(file)
            self._crew.check()

    def has(self, files: Iterable[str]) -> bool:
        """Whether all of `files` are readable."""
        with self._crew.condition:
            return self._readable.issuperset(files)

    def need(self, files: Iterable[str]) -> None:
        """Wait until all of `files`, those of the next blob, are readable. Raises StoppedError."""
        wanted = set(files)
        with self._crew.condition:
            self._crew.wait(lambda: wanted <= self._readable)

    def done(self, files: Iterable[str]) -> None:
        """The current blob's tensors have been read; the next blob's turn."""
        with self._crew.condition:
            self._current += 1
            for file in files:
                self._left[file] -= 1
                self._release_if_done(file)
            self._crew.condition.notify_all()

    def _take_turn(self, file: str) -> None:
        first_use = self._first_use.get(file, len(self._first_use))

        def ready() -> bool:
            return len(self._held) < self._source.max_held_files or first_use <= self._current

        with self._crew.condition:
            self._crew.wait(ready)
            self._held.add(file)

    def _release_if_done(self, file: str) -> None:
        if file in self._held and not self._left[file] and file not in self._undigested:
            self._held.discard(file)
            self._source.release(file)
            self._crew.condition.notify_all()

    def _checked_report(self, count_bytes: int) -> None:
        self._crew.check()
        self._report(count_bytes)
