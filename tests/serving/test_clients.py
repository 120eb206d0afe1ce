"""Clients that others wrote, beside OpenAI's own: curl, and litellm where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from support.runs.served import Served

from layerpack.runtime import GenerateOptions

BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl(server: Served) -> None:
    wanted = server.model.generate("hello", GenerateOptions(max_new_tokens=8)).text
    url = f"{server.url}/v1/chat/completions"
    whole = subprocess.run(
        ["curl", "-sf", url, "-d", json.dumps(BODY)], capture_output=True, text=True, check=True
    )
    assert json.loads(whole.stdout)["choices"][0]["message"]["content"] == wanted
    streamed = subprocess.run(
        ["curl", "-sfN", url, "-d", json.dumps(BODY | {"stream": True})],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = streamed.stdout.split("\n")
    events = [line[6:] for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]" and lines[0].startswith(": ping")
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == wanted
    assert not any(line.startswith(("id:", "retry:")) or line == "data: " for line in lines)


def test_litellm(server: Served) -> None:
    litellm = pytest.importorskip("litellm")
    wanted = server.model.generate("hello", GenerateOptions(max_new_tokens=8)).text
    how = {"model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": "-"}
    whole = litellm.completion(**how, **BODY)
    assert whole.choices[0].message.content == wanted
    pieces = litellm.completion(**how, **BODY, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted
    with pytest.raises(litellm.BadRequestError, match="grammar"):
        litellm.completion(**how, **BODY, extra_body={"grammar": "x"})
