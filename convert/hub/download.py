"""Getting one file of a Hub repository onto this machine, and whether it is the right one."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from layerpack.convert.hub.client import Listing, RemoteFile
from layerpack.convert.hub.errors import call_hub
from layerpack.formats.blob.header import TensorEntry, read_header
from layerpack.formats.errors import DiskFullError, HubError, SourceError
from layerpack.formats.units import human_bytes
from layerpack.libraries.hub_api import progress_class, xet_ended_by

_HASH_BYTES = 8 << 20


def download(
    listing: Listing,
    remote: RemoteFile,
    local_dir: Path | None,
    report: Callable[[int], None] = lambda _: None,
) -> Path:
    """Wait for one file to arrive in `local_dir`, or (None) in the usual cache; where it is then.

    `report` takes the bytes that are new since its last call, none while waiting for another try;
    it may raise to end the download. Raises HubError, DiskFullError.
    """
    from huggingface_hub import hf_hub_download

    progress = _Progress(report)

    def check() -> None:
        report(0)

    def fetch() -> str:
        with xet_ended_by(check):
            return hf_hub_download(
                listing.repo,
                remote.name,
                revision=listing.commit,
                local_dir=local_dir,
                tqdm_class=progress_class(progress.reach),
            )

    try:
        path = call_hub(f"{listing.repo}: {remote.name}", fetch, check=check)
    except DiskFullError as reason:
        place, free_bytes = _free_space(local_dir)
        raise DiskFullError(
            f"{place}: the disk is full, {remote.name} of {listing.repo} takes "
            f"{human_bytes(remote.file_bytes)} and {human_bytes(free_bytes)} are free; make room "
            "and run the same command again, it goes on from here"
        ) from reason
    progress.reach(remote.file_bytes)
    return Path(path)


def name_commit_in_cache(listing: Listing, name: str) -> None:
    """Let the usual cache know which commit the revision is, so that it is found offline, too.

    huggingface_hub notes it when a file, here `name`, is asked for by the revision's own name.
    """
    from huggingface_hub import hf_hub_download

    call_hub(
        f"{listing.repo}: {name}",
        lambda: hf_hub_download(listing.repo, name, revision=listing.revision),
    )


def fetch_checked(
    listing: Listing,
    remote: RemoteFile,
    target: Path | None,
    report: Callable[[int], None],
    header: tuple[TensorEntry, ...] | None = None,
) -> tuple[Path, str]:
    """Where a file is, in `target` or the usual cache, once it is what the Hub states; its sha256.

    One that is not is deleted and downloaded once more. Raises HubError.
    """
    where = f"{listing.repo}: {remote.name}"
    for last_try in (False, True):
        path = remote.cached or download(listing, remote, target, report)
        finding = examine(path, remote, header, check=lambda: report(0))
        if finding.problem is None:
            break
        if remote.cached:
            raise HubError(
                f"{path}: {finding.problem}; the cached copy is damaged: delete it, run again"
            )
        _delete(path)
        if last_try:
            raise HubError(f"{where}: {finding.problem}, at the second try, too; run again")
    if remote.cached:
        report(remote.file_bytes)
    return path, finding.sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The sha256 (hex) of a file that is here, and what is wrong with it, if anything."""

    sha256: str
    problem: str | None


def examine(
    path: Path,
    remote: RemoteFile,
    header: tuple[TensorEntry, ...] | None,
    *,
    check: Callable[[], None] = lambda: None,
) -> Finding:
    """Compare a file with what the Hub states of it: size, digest, header. Reads all of it.

    `check` is called on the way and may raise to end it.
    """
    try:
        found_bytes = path.stat().st_size
        digest = _sha256(path, check)
    except OSError as reason:
        raise SourceError(f"{path}: cannot be read ({reason.strerror})") from reason
    problem = None
    if found_bytes != remote.file_bytes:
        problem = f"{found_bytes} bytes arrived where the Hub states {remote.file_bytes}"
    elif remote.sha256 is not None and digest != remote.sha256:
        problem = f"its sha256 is {digest} where the Hub states {remote.sha256}"
    elif header is not None and _header_or_none(path) != header:
        problem = "its header is not the one that the Hub sent before"
    return Finding(sha256=digest, problem=problem)


def check_cache_space(repo: str, missing_bytes: int) -> None:
    """Raises DiskFullError if downloads of that size do not fit where the usual cache is."""
    place, free_bytes = _free_space(None)
    if free_bytes < missing_bytes:
        raise DiskFullError(
            f"{place}: {human_bytes(missing_bytes)} of {repo} are to be kept here but "
            f"{human_bytes(free_bytes)} are free; make room, set HF_HOME, or leave out "
            "--keep-source"
        )


def usual_cache() -> Path:
    """The directory that huggingface_hub keeps downloads in. It may not be there yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def existing_part(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def _free_space(local_dir: Path | None) -> tuple[Path, int]:
    """Where downloads go to (None: the usual cache), as far as it exists, and bytes free there."""
    place = existing_part(local_dir or usual_cache())
    return place, shutil.disk_usage(place).free


class _Progress:
    """Turns positions in a file into reports of bytes that are new."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report
        self._reached_bytes = 0

    def reach(self, position_bytes: int) -> None:
        """A download stands at this byte; one that began anew counts when it passes the old."""
        if position_bytes > self._reached_bytes:
            new_bytes = position_bytes - self._reached_bytes
            self._reached_bytes = position_bytes
            self._report(new_bytes)


def _sha256(path: Path, check: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_HASH_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            check()
    return digest.hexdigest()


def _header_or_none(path: Path) -> tuple[TensorEntry, ...] | None:
    try:
        return read_header(path, error=SourceError)
    except SourceError:
        return None


def _delete(path: Path) -> None:
    """The file, and in the usual cache the blob that it is a link to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
