"""Whether the Hub can be reached: one question, before a library asks for file after file.

transformers and huggingface_hub ask five times over for each file of a repository, with pauses, and
tell each time. That is right for a line that drops now and then, not for one that is not there.
"""

from __future__ import annotations

from pathlib import Path


def why_out_of_reach(name: str) -> str | None:
    """What keeps the Hub from answering about the repository `name`; None if nothing does.

    An answer of any kind will do. None, too, for what exists here, or cannot be a repository's
    name. Waits for an answer, 10 s at most (HF_HUB_ETAG_TIMEOUT).
    """
    if Path(name).exists():
        return None
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE:  # the libraries will ask nobody
        return None
    try:
        HfApi().model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as reason:  # of httpx or httpx2, by the version of huggingface_hub
        text = str(reason).strip().splitlines() or [type(reason).__name__]
        return f"{constants.ENDPOINT} cannot be reached ({text[0]})"
    return None
