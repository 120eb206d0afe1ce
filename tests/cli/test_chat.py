"""`layerpack chat`: turns go on from each other, commands do what they say, nothing ends it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from layerpack.cli.main import main
from layerpack.runtime import GenerateOptions, Model, OpenOptions

PackOf = Callable[..., Path]


@pytest.fixture
def chat(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """`chat("turn", "/undo", …)`: what is written on standard output and error."""

    def talk(*lines: str, more: tuple[object, ...] = ()) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        arguments = ["--device", "cpu", "--max-new-tokens", "6", *map(str, more)]
        with pytest.raises(SystemExit) as ended:
            main(["chat", str(pack_of("llama")), *arguments])
        assert not ended.value.code
        said = capsys.readouterr()
        return said.out, said.err

    return talk


def test_turns_go_on_from_each_other(chat: Callable[..., tuple[str, str]], pack_of: PackOf) -> None:
    out, err = chat("hello", "and then?", "/stats")
    how = GenerateOptions(max_new_tokens=6)
    with Model.open(pack_of("llama"), OpenOptions(device="cpu")) as model:
        first = model.generate("hello", how).text
        messages = [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "and then?"},
        ]
        second = model.generate(messages, how).text
    assert out == f"{first}\n{second}\n"
    known = int(err.split(" tokens of prompt, ")[1].split(" ")[0])
    assert known >= 8 and "passes" in err


def test_undo_retry_system_save_load(chat: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    out, _ = chat("hello", "/retry", f"/save {file}")
    first, again = out.splitlines()[0], out.splitlines()[-1]
    assert first == again  # greedy
    assert [m["role"] for m in json.loads(file.read_text())] == ["user", "assistant"]
    out, _ = chat("one", "hello", "/undo", "/undo", "/system Be brief.", "hello", f"/save {file}")
    saved = json.loads(file.read_text())
    assert [m["content"] for m in saved[:2]] == ["Be brief.", "hello"] and len(saved) == 3
    loaded, _ = chat("/undo", "hello", more=("--load", file))
    assert loaded.strip() == saved[2]["content"].strip()
    seeded, _ = chat("hello", "/retry", more=("--temperature", "1.5", "--seed", "3"))
    assert len(set(seeded.splitlines())) > 1


def test_what_goes_wrong_is_said_and_it_goes_on(
    chat: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "other.json").write_text("{}")
    lines = ["/undo", "/retry", "/save", f"/load {tmp_path}/none", f"/load {tmp_path}/other.json"]
    out, err = chat(*lines, "x" * 5000, "hello")
    assert len(err.strip().splitlines()) == 6, err
    assert "no turn to take back" in err and "context" in err
    assert out.strip()


def test_several_lines_and_the_end(chat: Callable[..., tuple[str, str]]) -> None:
    assert chat("first \\", "second")[0] == chat("first \\", "second", "/exit", "never")[0]


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX'")
def test_ctrl_c_ends_an_answer_not_the_chat(pack_of: PackOf) -> None:
    command = [sys.executable, "-m", "layerpack.cli.main", "chat", str(pack_of("llama"))]
    command += ["--device", "cpu", "--max-new-tokens", "3000"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"xyz\n")  # 234 tokens to answer: more than a second
        process.stdin.flush()
        first = process.stdout.read(1)  # maybe a part of a character
        assert first
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"/stats\n")
        process.stdin.close()
        out, err = (first + process.stdout.read()).decode(), process.stderr.read().decode()
    assert process.returncode == 0, err
    assert out.endswith(" …\n") and "tokens in" in err
