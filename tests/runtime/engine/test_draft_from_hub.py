"""A draft named as a repository of the Hub, with a network and without; each run a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.hub.server import HubServer, Repo

PackOf = Callable[..., Path]
NO_SERVER = "http://127.0.0.1:9"


@pytest.fixture
def generate(pack_of: PackOf, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`generate(repo, endpoint)`: the command with that draft; what is downloaded is kept."""

    def call(repo: str, endpoint: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "layerpack.cli.main", "generate", str(pack_of("llama"))]
        command += ["--prompt", "hello", "--device", "cpu", "--max-new-tokens", "12"]
        hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub")}
        return subprocess.run(
            [*command, "--draft", repo],
            env={**os.environ, **hub},
            capture_output=True,
            timeout=120,
            check=False,
            encoding="utf-8",
        )

    return call


def test_a_name_of_nothing_is_told_without_trying_again(
    generate: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = generate("org/none", NO_SERVER)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        rf"layerpack: error: draft org/none: {NO_SERVER} cannot be reached \(.*refused\), "
        r"the local cache lacks it, and there is no such directory here; check the name and .*\n",
        done.stderr,
    ), done.stderr


def test_a_draft_that_was_downloaded_needs_no_network(
    generate: Callable[..., subprocess.CompletedProcess[str]], checkpoint_of: Callable[..., Path]
) -> None:
    server = HubServer()
    with server.running():
        server.repos["org/tiny"] = Repo(directory=checkpoint_of("llama"))
        first = generate("org/tiny", server.url)
        assert first.returncode == 0, first.stderr
        assert server.num_requests("^/cdn/.*safetensors") > 0
    again = generate("org/tiny", NO_SERVER)
    assert again.stdout == first.stdout and " proposed ones accepted" in again.stderr
    assert again.stderr.count("\n") == 1, again.stderr  # the summary alone
