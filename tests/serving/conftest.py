"""A server of a tiny pack for the tests here, and OpenAI's own client of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from support.runs.served import Served, served


@pytest.fixture(scope="module")
def server(pack_of: Callable[..., Path]) -> Iterator[Served]:
    """It serves as long as the tests of a file run."""
    with served(pack_of("llama")) as found:
        yield found


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    """A client of it that does not try again."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
