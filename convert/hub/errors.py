"""What can go wrong with the Hub, in plain words, and which of it is worth another try."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from layerpack.formats.disk import is_full
from layerpack.formats.errors import DiskFullError, HubError, LayerpackError
from layerpack.formats.text import first_line
from layerpack.libraries.hub_api import http, is_xet_error, status_of

Result = TypeVar("Result")

WAITS_S = (1.0, 3.0, 9.0, 27.0)
"""Pauses between tries; a Retry-After of the server, up to the longest wait, replaces them."""
LONGEST_WAIT_S = 120.0
_CHECK_EVERY_S = 0.2
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError)
"""What an answer that was to be JSON ends in if it is none: the page of a proxy, or of a log-in."""


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT or the public one."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def require_endpoint() -> None:
    """Raises HubError where HF_ENDPOINT is no address: huggingface_hub then fails as an import."""
    address = os.environ.get("HF_ENDPOINT", "")
    try:
        _ = urlsplit(address).port
    except ValueError as reason:
        raise HubError(
            f"HF_ENDPOINT={address}: not the address of a Hub ({reason}); mend it, or unset it"
        ) from None


def call_hub(
    what: str,
    action: Callable[[], Result],
    *,
    check: Callable[[], None] = lambda: None,
    is_first: bool = False,
) -> Result:
    """`action`'s result, tried again after refusals for load, server errors and cut connections.

    `what` names the repository, or a file of it, in messages. `check` is called often while
    waiting for the next try, and may raise to end it. `is_first`: no work would be lost, so a Hub
    that no connection can be made to is given up at once. Raises HubError, or DiskFullError where
    a download found no room.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return action()
        except LayerpackError:
            raise
        except Exception as reason:
            if not _is_known(reason):
                raise
            check()
            is_final = not _is_transient(reason) or (is_first and _is_unreachable(reason))
            if wait_s is None or is_final:
                raise _translated(what, reason) from reason
            _wait(min(_retry_after_s(reason) or wait_s, LONGEST_WAIT_S), check)
    raise AssertionError("unreachable")


def _wait(wait_s: float, check: Callable[[], None]) -> None:
    end_s = time.monotonic() + wait_s
    while (left_s := end_s - time.monotonic()) > 0:
        check()
        time.sleep(min(left_s, _CHECK_EVERY_S))


def _is_known(reason: Exception) -> bool:
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    known = (OSError, EntryNotFoundError, HFValidationError, http().HTTPError, *_NOT_JSON)
    return isinstance(reason, known) or is_xet_error(reason)


def _is_transient(reason: BaseException | None) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(reason, LocalEntryNotFoundError):
        return _is_transient(reason.__cause__)
    if isinstance(reason, http().TransportError):
        return not isinstance(reason, http().UnsupportedProtocol)  # an address without https://
    if "Consistency check failed" in str(reason):  # the connection ended early, without an error
        return True
    return status_of(reason) in (*_TRANSIENT, 416)  # 416: the file has become shorter meanwhile


def _is_unreachable(reason: Exception) -> bool:
    """Whether there was no connection at all: no network, or a name that is of no server."""
    return isinstance(reason, (http().ConnectError, http().ConnectTimeout))


def _retry_after_s(reason: BaseException | None) -> float | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(reason, LocalEntryNotFoundError):
        reason = reason.__cause__
    response = getattr(reason, "response", None)
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return float(text) if text.isdecimal() else None


def _translated(what: str, reason: Exception) -> LayerpackError:
    from huggingface_hub import errors

    hub, repo = endpoint(), what.partition(":")[0]
    while isinstance(reason, errors.LocalEntryNotFoundError) and isinstance(
        reason.__cause__, Exception
    ):
        reason = reason.__cause__
    if is_full(reason):
        return DiskFullError(f"{what}: no room left for the download; make room and run again")
    if isinstance(reason, errors.GatedRepoError):
        text = (
            f"its owner asks for terms to be accepted: do so at {hub}/{repo}, then run "
            "`hf auth login` or set HF_TOKEN"
        )
    elif isinstance(reason, errors.RepositoryNotFoundError):
        text = (
            f"no such repository at {hub}, or a private one{_nor_here(what)}; check the name, and "
            "log in with `hf auth login` or HF_TOKEN if it is private"
        )
    elif isinstance(reason, errors.RevisionNotFoundError):
        text = "no such revision; name a branch, a tag or a commit that the repository has"
    elif isinstance(reason, errors.HFValidationError):
        text = "not a name that a Hub repository can have (owner/name)"
    elif isinstance(reason, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        text = (
            "not in the local cache, and HF_HUB_OFFLINE keeps layerpack from asking the Hub"
            f"{_nor_here(what)}"
        )
    elif isinstance(reason, errors.EntryNotFoundError):
        text = f"not in the repository at {hub}"
    elif (status := status_of(reason)) is not None:
        text = _of_status(status, hub)
    elif isinstance(reason, _NOT_JSON):
        text = (
            f"{hub} answered with something else than a Hub does; check HF_ENDPOINT, and whether a "
            "proxy or a log-in page stands between"
        )
    elif isinstance(reason, http().TransportError):
        text = (
            f"{hub} cannot be reached ({first_line(reason)}){_nor_here(what)}; check the network "
            "and run again"
        )
    else:
        text = f"the download failed ({first_line(reason)}); run again"
    return HubError(f"{what}: {text}")


def _nor_here(what: str) -> str:
    """For a name that may be a mistyped directory; a file or revision of a repository is not."""
    return "" if ":" in what else ", and there is no such directory here"


def _of_status(status: int, hub: str) -> str:
    if status in (401, 403):
        return f"{hub} refused access ({status}); the token may be wrong: run `hf auth login`"
    if status == 429:
        return f"{hub} still refuses for too many requests (429); run again later"
    return f"{hub} answered with status {status}; run again later"
