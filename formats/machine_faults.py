"""What a machine lacked, whatever it was that failed for it: the cause, not the file in its way."""

from __future__ import annotations

import errno
from collections.abc import Iterator

_NO_TEMPORARY = "No usable temporary directory"  # Python's own words


def machine_fault(error: BaseException) -> str | None:
    """One line on the cause if the error, or one that it came from, is the machine's."""
    for reason in _chain(error):
        if not isinstance(reason, OSError):
            continue
        if reason.errno in (errno.EMFILE, errno.ENFILE):
            return f"{_file_limit()}; raise the limit (ulimit -n 1024) and run again"
        if _NO_TEMPORARY in str(reason):
            return "no directory for temporary files can be written to; set TMPDIR to one that can"
    return None


def raise_machine_fault(error: BaseException) -> None:
    """Raise the error if what it failed for is the machine's: no finding about a file then."""
    if machine_fault(error) is not None:
        raise error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from or during, each once."""
    left, seen = [error], set()
    while left:
        reason = left.pop()
        if id(reason) in seen:
            continue
        seen.add(id(reason))
        yield reason
        left += [other for other in (reason.__cause__, reason.__context__) if other is not None]


def _file_limit() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "too many files are open"
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"too many files are open: this process may have {limit}"
