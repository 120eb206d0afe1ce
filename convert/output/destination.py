"""Where a pack is built, beside its target, and how it gets the target's name.

OUT.layerpack-partial/      one conversion's; kept after a break, for the same command to go on
    journal                 what is done (journal.py)
    pack/                   the pack to be: renamed to OUT when it is whole
    source/                 scratch for downloads
    replaced/               what stood under OUT's name, for the moment of the rename
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerpack.convert.output.journal import JOURNAL_NAME
from layerpack.formats.disk import is_full, sync_directory, try_lock, write_whole
from layerpack.formats.errors import DiskFullError, TargetError
from layerpack.formats.manifest.facts import MANIFEST_NAME, UNFINISHED_SUFFIX
from layerpack.formats.units import human_bytes


class Destination:
    """Paths of one conversion, and the steps that change names. Holds nothing open but the lock.

    Raises TargetError for the root directory, beside which nothing can be.
    """

    def __init__(self, out: Path | str) -> None:
        """Raises TargetError for an empty name, which would be the current directory."""
        if not str(out):
            raise TargetError("the target's name is empty; name a directory")
        self.out = Path(os.path.abspath(out))
        if not self.out.name:
            raise TargetError(f"{self.out}: the root directory; name a target inside it")
        self.partial = self.out.with_name(self.out.name + UNFINISHED_SUFFIX)
        self.pack = self.partial / "pack"
        self.scratch = self.partial / "source"
        self.journal = self.partial / JOURNAL_NAME
        self._lock = self.partial / "lock"

    def check_target(self, *, force: bool) -> None:
        """Raises TargetError if something stands under the name, or nothing can be made there.

        `force` lets a pack be replaced, or a link, and nothing else.
        """
        parent = self.out.parent
        if not parent.is_dir():
            raise TargetError(f"{parent}: no such directory; make it first")
        if not os.access(parent, os.W_OK):
            raise TargetError(f"{parent}: not writable")
        if self.out.is_symlink() or self.out.exists():
            if os.path.ismount(self.out):
                raise TargetError(
                    f"{self.out}: a mount point, which a finished pack cannot take the place of; "
                    "name a directory inside it"
                )
            if self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir()):
                return
            if self.partial.is_dir() and not self.pack.exists():
                shutil.rmtree(self.partial, ignore_errors=True)  # killed after the rename
            if not force:
                raise TargetError(f"{self.out}: exists; name another target or use --force")
            if not self.out.is_symlink() and not (self.out / MANIFEST_NAME).is_file():
                raise TargetError(
                    f"{self.out}: exists and is no pack, which is all that --force replaces; "
                    "name another target, or remove it yourself"
                )

    def refuse_source(self, source: Path | str) -> None:
        """Raises TargetError if the target is `source` (a path, or a Hub repo) or holds it."""
        path = Path(source).expanduser()
        if not os.path.lexists(path):
            return  # a Hub repo
        read, replaced = Path(os.path.realpath(path)), Path(os.path.realpath(self.out))
        if read == replaced:
            raise TargetError(f"{self.out}: is the source itself; name another target")
        if replaced in read.parents and self.out.is_dir():
            raise TargetError(f"{self.out}: holds the source {source}; name another target")

    @contextmanager
    def held(self) -> Iterator[None]:
        """The partial directory exists and is this process's alone. Raises TargetError.

        Left with nothing that a resumed run could use, it is removed again.
        """
        with _os_errors(self.partial):
            self.pack.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not try_lock(lock):
                raise TargetError(f"{self.partial}: another conversion is at work there")
            try:
                yield
            finally:
                if not self._is_worth_keeping():
                    shutil.rmtree(self.partial, ignore_errors=True)
        finally:
            os.close(lock)

    def is_held(self) -> bool:
        """Whether a process is at work there, as far as the system can tell."""
        try:
            lock = os.open(self._lock, os.O_RDWR)
        except OSError:
            return False
        try:
            return not try_lock(lock, shared=True)
        finally:
            os.close(lock)

    def _is_worth_keeping(self) -> bool:
        # Before there is a journal, all that can be there are a checkpoint's small files.
        downloads = self.scratch.is_dir() and any(self.scratch.iterdir())
        return self.journal.exists() and (bool(self.pack_files()) or downloads)

    def pack_files(self) -> list[Path]:
        """What is finished in the pack to be."""
        return sorted(self.pack.iterdir()) if self.pack.is_dir() else []

    def discard(self, *, in_use: Path | None = None) -> None:
        """Throw away unfinished work, downloads included, but for what is `in_use` among them."""
        with _os_errors(self.partial):
            self.journal.unlink(missing_ok=True)
            shutil.rmtree(self.pack)
            for path in self.scratch.iterdir() if self.scratch.is_dir() else ():
                if path != in_use:
                    _remove(path)
            self.pack.mkdir()

    def check_space(
        self, *, pack_bytes: int, download_bytes: int = 0, least_pack_bytes: int | None = None
    ) -> None:
        """Raises DiskFullError if what is still to be written cannot fit on the disk.

        That is known of `least_pack_bytes`, if given; `pack_bytes` are then the most it can be.
        `download_bytes` are those of downloads that lie beside the pack at a time.
        """
        needed = pack_bytes + download_bytes
        least = needed if least_pack_bytes is None else least_pack_bytes + download_bytes
        free = shutil.disk_usage(self.partial).free
        if free >= least:
            return
        at_most = "at most " if least < needed else ""
        beside = f" and {human_bytes(download_bytes)} of downloads" if download_bytes else ""
        raise DiskFullError(
            f"{self.out.parent}: {at_most}{human_bytes(pack_bytes)} of pack{beside} are to be "
            f"written but {human_bytes(free)} are free; make room for {human_bytes(needed - free)} "
            "more"
        )

    def disk_full(
        self, missing_bytes: int, *, compressed: bool = False, resumes: bool = True
    ) -> DiskFullError:
        """The error for a disk that filled up during the work.

        `missing_bytes` of the pack are still to be written; `compressed`, that is the most it can
        be. `resumes` says whether another run goes on from here or begins anew.
        """
        free = shutil.disk_usage(self.partial).free
        more = f" for {human_bytes(missing_bytes - free)} more" if missing_bytes > free else ""
        return DiskFullError(
            f"{self.out.parent}: the disk is full, {'at most ' if compressed else ''}"
            f"{human_bytes(missing_bytes)} of the pack are still to be written and "
            f"{human_bytes(free)} are free; make room{more} and run the same command again"
            + (", it goes on from here" if resumes else "")
        )

    def sync_names(self) -> None:
        """Bring the journal's name, and the way to it, to the disk: a line is no use without."""
        for directory in (self.partial, self.out.parent):
            sync_directory(directory)

    def write_file(self, name: str, data: bytes) -> None:
        """One small file of the pack, whole or not there, on the disk when this returns."""
        write_whole(self.pack / name, data)

    def commit(self, *, force: bool) -> None:
        """Give the finished pack its name, in place of what stands there, and clean up.

        Raises TargetError where that is nothing that may be replaced: it came during the work.
        """
        self.check_target(force=force)
        sync_directory(self.pack)
        replaced = self.partial / "replaced"
        with _os_errors(self.out):
            _remove(replaced)
            try:
                if os.path.lexists(self.out):
                    os.rename(self.out, replaced)
                os.rename(self.pack, self.out)
            except BaseException:  # Ctrl-C, too: what stood there must not go with the rest
                if os.path.lexists(replaced) and not os.path.lexists(self.out):
                    os.rename(replaced, self.out)
                raise
            sync_directory(self.out.parent)
        shutil.rmtree(self.partial, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as reason:
        if is_full(reason):
            raise
        raise TargetError(f"{path}: cannot be written ({reason.strerror})") from reason
