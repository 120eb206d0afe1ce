"""What layerpack/libraries/hub_api.py takes from inside huggingface_hub is there."""

from __future__ import annotations

import inspect

import huggingface_hub
import pytest
from huggingface_hub import utils
from huggingface_hub.errors import HfHubHTTPError

from layerpack.libraries import hub_api


def test_its_errors_are_those_of_its_http_library() -> None:
    """HfHubHTTPError's base names the HTTP library: httpx, or httpx2 in version 2."""
    library = hub_api.http()
    assert issubclass(HfHubHTTPError, library.HTTPError)
    assert issubclass(library.ConnectError, library.TransportError)


def test_progress_goes_through_a_class_of_ours() -> None:
    """hf_hub_download(tqdm_class=…), and `initial` and `update` of such a class."""
    assert "tqdm_class" in inspect.signature(huggingface_hub.hf_hub_download).parameters
    reached: list[int] = []
    bar = hub_api.progress_class(reached.append)(total=10, initial=3)
    bar.update(4)
    bar.close()
    assert reached == [7]


def test_requests_of_our_own_carry_its_headers() -> None:
    """utils.build_hf_headers, utils.hf_raise_for_status, get_session().stream."""
    headers, check = (getattr(utils, n) for n in ("build_hf_headers", "hf_raise_for_status"))
    assert "user-agent" in {key.lower() for key in headers()} and callable(check)
    assert callable(huggingface_hub.get_session().stream)


def test_xet_downloads_can_be_ended() -> None:
    """utils._xet.abort_xet_session."""
    pytest.importorskip("hf_xet")
    from huggingface_hub.utils._xet import abort_xet_session

    assert callable(abort_xet_session)
    hub_api.abort_xet()
