"""`layerpack batch`: each request answered once, as `generate` would, through any break."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerpack.cli.main import main
from layerpack.formats.errors import SourceError
from layerpack.runtime import GenerateOptions, Model, OpenOptions
from layerpack.serving.batch import read_prompts, read_requests

PackOf = Callable[..., Path]
KILLS = int(os.environ.get("LAYERPACK_TEST_KILLS", "2"))
COMMAND = [sys.executable, "-m", "layerpack.cli.main", "batch"]


def request(custom_id: str, **body: Any) -> dict[str, Any]:
    chat = {"messages": [{"role": "user", "content": custom_id}], "max_tokens": 8}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": chat | body,
    }


def write(path: Path, lines: list[Any]) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["batch", *map(str, arguments), "--device", "cpu"])
    return int(ended.value.code or 0)


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(result: dict[str, Any]) -> str:
    (choice,) = result["response"]["body"]["choices"]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_files_as_windows_saves_them(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "text"
    path.write_bytes("Grüße\r\n\r\n世界\r\n".encode(encoding))
    found = [(line.number, line.body["messages"][0]["content"]) for line in read_prompts(path, {})]
    assert found == [(1, "Grüße"), (3, "世界")]
    path.write_bytes(f"{json.dumps(request('Grüße'))}\r\n".encode(encoding))
    (line,) = read_requests(path)
    assert line.problem is None and line.custom_id == "Grüße"


def test_a_file_that_breaks_its_own_mark(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfea")
    for read in (read_requests, lambda path: read_prompts(path, {})):
        with pytest.raises(SourceError, match=r"text: not UTF-16 text \(byte 3 is the first"):
            read(tmp_path / "text")


def test_answers_are_those_of_generate(pack_of: PackOf, tmp_path: Path) -> None:
    pack, out = pack_of("llama"), tmp_path / "results.jsonl"
    asked = [
        request("greedy", temperature=0),
        request("sampled", temperature=0.8, seed=5),
        request("two", n=2, seed=1, logprobs=True, top_logprobs=2),
        request("parts", messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]),
        {
            "custom_id": "plain",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "once upon", "max_tokens": 8, "temperature": 0},
        },
    ]
    assert run(pack, write(tmp_path / "requests.jsonl", asked), "-o", out) == 0
    found = {one["custom_id"]: one for one in results(out)}
    assert found.keys() == {one["custom_id"] for one in asked}
    with Model.open(pack, OpenOptions(device="cpu")) as model:
        for name, prompt, how in (
            ("greedy", "greedy", GenerateOptions(max_new_tokens=8)),
            ("sampled", "sampled", GenerateOptions(max_new_tokens=8, temperature=0.8, seed=5)),
            ("plain", "once upon", GenerateOptions(max_new_tokens=8, raw=True)),
        ):
            done = model.generate(prompt, how)
            assert text_of(found[name]) == done.text
            body = found[name]["response"]["body"]
            assert body["usage"]["completion_tokens"] == len(done.token_ids)
            assert body["usage"]["prompt_tokens"] == done.prompt_tokens
            assert body["choices"][0]["finish_reason"] == done.finish
    choices = found["two"]["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert choices[0]["message"] != choices[1]["message"]
    first = choices[0]["logprobs"]["content"][0]
    assert first["logprob"] <= 0 and len(first["top_logprobs"]) == 2


def test_a_bad_line_is_one_result(
    pack_of: PackOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    lines = [
        request("good"),
        "not json",
        request("good"),
        request("wild", temperature="hot"),
        request("unknown", grammar="x"),
        request("long", messages=[{"role": "user", "content": "x" * 5000}]),
        {"custom_id": "elsewhere", "method": "POST", "url": "/v1/embeddings", "body": {}},
        '{"method": "POST"}',
    ]
    assert run(pack_of("llama"), write(tmp_path / "in.jsonl", lines), "-o", out) == 1
    found = results(out)
    assert len(found) == len(lines)
    statuses = [(one["custom_id"], one["response"]["status_code"]) for one in found]
    assert sorted(statuses, key=str) == sorted(
        [
            ("good", 200),
            (None, 400),
            ("good", 400),
            ("wild", 400),
            ("unknown", 400),
            ("long", 400),
            ("elsewhere", 404),
            (None, 400),
        ],
        key=str,
    )
    said = {one["custom_id"]: one["error"] for one in found if one["error"]}
    assert "temperature" in said["wild"]["message"] and said["unknown"]["param"] == "grammar"
    assert "1 answers in" in capsys.readouterr().err
    before = out.read_bytes()
    assert run(pack_of("llama"), tmp_path / "in.jsonl", "-o", out) == 0
    assert out.read_bytes() == before


def test_prompts_a_line_each(pack_of: PackOf, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    (tmp_path / "prompts.txt").write_bytes(b"first\n\nthird \xc3\xa9\n\xff\xfe\n")
    arguments = ("--prompts", tmp_path / "prompts.txt", "--system", "Be brief.")
    code = run(pack_of("llama"), *arguments, "-o", out, "--max-new-tokens", "5")
    found = {one["custom_id"]: one["response"]["status_code"] for one in results(out)}
    assert (code, found) == (1, {"line-1": 200, "line-3": 200, "line-4": 400})
    with Model.open(pack_of("llama"), OpenOptions(device="cpu")) as model:
        how = GenerateOptions(max_new_tokens=5, system="Be brief.")
        texts = {one["custom_id"]: text_of(one) for one in results(out)[1:]}
        assert texts["line-3"] == model.generate("third é", how).text


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX'")
def test_killed_at_any_moment_it_goes_on(pack_of: PackOf, tmp_path: Path) -> None:
    pack, chance = pack_of("llama"), random.Random(4)
    asked = [
        request(f"number {n}", max_tokens=5 + n % 30, temperature=n % 2) for n in range(30 * KILLS)
    ]
    path = write(tmp_path / "requests.jsonl", asked)
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert run(pack, path, "-o", whole) == 0
    arguments = [*COMMAND, str(pack), str(path), "-o", str(broken), "--device", "cpu"]
    kills, sizes = 0, [0]
    for _ in range(KILLS):
        with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and (
                not broken.exists() or broken.stat().st_size <= sizes[-1]
            ):
                time.sleep(0.005)
            time.sleep(chance.random() * 0.1)
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
        sizes.append(broken.stat().st_size)
    assert kills and len(results(whole)) == 30 * KILLS
    with open(broken, "ab") as file:
        file.write(b'{"custom_id": "number')  # a line that the power did not last for
    assert run(pack, path, "-o", broken) == 0
    found = results(broken)
    assert len(found) == 30 * KILLS
    texts = [{one["custom_id"]: text_of(one) for one in each} for each in (found, results(whole))]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("none.jsonl", None, "No such file"),
        ("empty.jsonl", "\n\n", "no requests in it"),
    ],
)
def test_files_that_are_none(
    pack_of: PackOf,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str | None,
    words: str,
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert run(pack_of("llama"), tmp_path / name, "-o", tmp_path / "out.jsonl") == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_another_file_is_not_written_to(
    pack_of: PackOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "in.jsonl", [request("a")])
    assert run(pack_of("llama"), path, "-o", path) == 1
    assert "not a file of results" in capsys.readouterr().err
    assert path.read_text().count("\n") == 1
