"""`layerpack generate` from end to end on tiny packs: what goes where, and how it ends."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerpack.runtime import opening
from layerpack.runtime.engine import sequence
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.prompt import encode_prompt
from layerpack.runtime.tokenizer import load_tokenizer

PackOf = Callable[..., Path]
Run = Callable[..., Any]
PROMPT = "hello there"
SUMMARY = re.compile(
    r"\[\d+ tokens in \d+\.\d s, \d+\.\d{3} s a token; \d+ passes of \d+\.\d{3} s; "
    r".* streamed a pass, .* in all\]\n"
)


def test_text_goes_to_stdout_and_the_summary_to_stderr(generate: Run) -> None:
    done = generate("--prompt", PROMPT)
    assert done.code == 0
    assert done.out.endswith("\n") and len(done.out) > 1 and "tokens in" not in done.out
    assert SUMMARY.fullmatch(done.err), done.err
    assert done.err.startswith("[12 tokens in ")
    assert "; 12 passes of " in done.err


def test_a_prompt_from_an_option_a_file_or_stdin(
    generate: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = generate("--prompt", PROMPT).out
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert generate("--prompt-file", tmp_path / "prompt.txt").out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode())))
    assert generate().out == expected


def test_raw_and_system_change_what_is_sent(generate: Run) -> None:
    texts = {
        generate("--prompt", PROMPT, *more).out
        for more in ([], ["--raw"], ["--system", "You are brief."])
    }
    assert len(texts) == 3


def test_usage_errors_end_with_2(generate: Run, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe\xff")
    for arguments, said in (
        (["--prompt", "a", "--prompt-file", "b"], "not both"),
        (["--prompt-file", tmp_path / "nowhere"], "cannot be read (No such file or directory)"),
        (["--prompt-file", tmp_path / "prompt.txt"], "not UTF-16 text"),
        (["--prompt", "a", "--prompt-lookup", "3", "--no-prompt-lookup"], "not both"),
        (["--prompt", "a", "--system", "b", "--raw"], "--raw leaves out"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["--prompt", "a", "--top-p", "0"], "--top-p"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "a", "--vram", "much"], "is not a size"),
        (["--prompt", "a", "--slots", "1"], "--slots"),
    ):
        done = generate(*arguments)
        assert done.code == 2, arguments
        assert "Error: " in done.err and said in done.err, done.err
        assert done.out == ""


def test_text_that_is_not_utf8(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, said in (
        (["--prompt", "a\udcffb"], "--prompt is not UTF-8 text (character 2 "),
        (["--prompt", "a\udcffb", "--raw"], "--prompt is not UTF-8 text"),
        (["--prompt", "a", "--system", "\udcff"], "--system is not UTF-8 text"),
    ):
        done = generate(*arguments)
        assert done.code == 2 and said in done.err, done.err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    done = generate()
    assert done.code == 2 and "standard input: not UTF-8 text" in done.err, done.err


def test_template_arguments_reach_the_template(generate: Run, pack_of: PackOf) -> None:
    tokenizer = load_tokenizer(pack_of("llama"))
    tokenizer.chat_template = "{{ messages[0].content }}{% if loud %}!{% endif %}"
    how = GenerateOptions(template_arguments={"loud": True})
    assert encode_prompt(tokenizer, PROMPT, how) == tokenizer(PROMPT + "!").input_ids
    done = generate("--prompt", "a", "--raw", "--template-arg", "loud=true")
    assert done.code == 2 and "--raw leaves out" in done.err
    assert_refused(
        generate("--prompt", "a", "--template-arg", "tokenize=false"),
        "template argument tokenize: no chat template gets that",
    )


def test_what_libraries_say_is_in_no_text(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate("--prompt", PROMPT).out
    ask: Any = getattr(sequence, "step")  # noqa: B009 - imported there

    def noisy(*arguments: Any, **how: Any) -> Any:
        warnings.warn("the old name goes in 5.40", FutureWarning, stacklevel=1)
        logging.getLogger("transformers").error("an error")
        logging.getLogger("anything").critical("worse")
        return ask(*arguments, **how)

    monkeypatch.setattr(sequence, "step", noisy)
    done = generate("--prompt", PROMPT)
    assert done.out == expected and SUMMARY.fullmatch(done.err), done.err
    assert logging.root.manager.disable == 0


def test_no_prompt_at_all(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    done = generate()
    assert done.code == 2 and "no prompt; give --prompt TEXT" in done.err
    monkeypatch.setattr("sys.stdin", None)  # as Python has it after `<&-`
    done = generate()
    assert done.code == 2 and "no prompt; give --prompt TEXT" in done.err


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_an_empty_prompt(generate: Run, prompt: str) -> None:
    assert_refused(generate("--prompt", prompt), r"the prompt is empty; give some text")


def test_a_prompt_longer_than_the_context(generate: Run) -> None:
    assert_refused(
        generate("--prompt", "a" * 300, "--raw"),
        r"the prompt has 300 tokens, the model's context is 256; shorten it",
    )
    assert_refused(
        generate("--prompt", "a" * 30, "--raw", "--context", 30),
        r"the prompt has 30 tokens, memory was set aside for 30; .*\(--context\)",
    )


def test_generation_ends_at_the_end_of_the_context(generate: Run) -> None:
    done = generate("--prompt", "a" * 250, "--raw", "--max-new-tokens", 100)
    assert done.code == 0 and done.err.startswith("[6 tokens in ")
    done = generate("--prompt", "a" * 30, "--raw", "--context", 32, "--max-new-tokens", 100)
    assert done.code == 0 and done.err.startswith("[2 tokens in ")


def test_no_chat_template(generate: Run, pack_of: PackOf, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(pack_of("llama"), tmp_path / "pack"))
    (pack / "chat_template.jinja").unlink()
    assert_refused(
        generate("--prompt", PROMPT, pack=pack), r"this model has no chat template; use --raw"
    )
    assert generate("--prompt", PROMPT, "--raw", pack=pack).code == 0


def test_sampling_is_repeatable(generate: Run) -> None:
    def text(*arguments: object) -> Any:
        return generate("--prompt", PROMPT, "--temperature", 1.5, *arguments).out

    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)
    greedy = generate("--prompt", PROMPT).out
    assert text("--seed", 1) != greedy
    # One token to choose from, or one that alone reaches the share asked for.
    assert text("--seed", 1, "--top-k", 1) == text("--seed", 2, "--top-p", 1e-6) == greedy


def test_proposed_tokens_are_in_the_summary(generate: Run, pack_of: PackOf) -> None:
    plain = generate("--prompt", PROMPT)
    drafted = generate("--prompt", PROMPT, "--draft", pack_of("llama"), "--draft-tokens", 10, "-v")
    assert drafted.out == plain.out
    assert "s opening: draft " in drafted.err
    assert re.search(
        r"\[12 tokens in .*; \d passes of .*; \d\.\d tokens a pass, \d+ of \d+ proposed ones",
        drafted.err,
    )
    assert generate("--prompt", PROMPT, "--prompt-lookup", 4).out == plain.out


def test_verbose_says_where_the_time_went(generate: Run) -> None:
    *plan, setup, _ = generate("--prompt", PROMPT, "-v").err.splitlines()
    assert any(line.startswith("device ") for line in plan)
    assert re.fullmatch(r"\[set-up: .* imports; .* opening: plan .*, tokenizer .*\]", setup)
    assert plan[-1].startswith("equal bits for any number of tokens in a pass: products ")


def test_a_model_that_takes_no_rows_says_so(
    generate: Run, pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generate("--prompt", PROMPT).out
    monkeypatch.setattr(opening, "why_no_rows", lambda _: "its positions cannot be given")
    done = generate("--prompt", PROMPT, "--prompt-lookup", 4)
    said = "note: one token a pass, none can be tried: its positions cannot be given\n"
    assert done.code == 0 and done.err.startswith(said) and len(done.out) == len(plain)
    refused = generate("--prompt", PROMPT, "--draft", pack_of("llama"))
    assert_refused(refused, r"draft .*: .* cannot check its tokens \(its positions .*\)")


def test_packs_that_cannot_be_opened(generate: Run, pack_of: PackOf, tmp_path: Path) -> None:
    def damaged(name: str, damage: Callable[[Path], object]) -> Path:
        pack = Path(shutil.copytree(pack_of("llama"), tmp_path / name))
        damage(pack)
        return pack

    (tmp_path / "empty").mkdir()
    layer = "layer-001.safetensors"
    for pack, said in (
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path / "empty", "not a pack"),
        (damaged("manifest", lambda p: (p / "layerpack.json").write_text("{")), "layerpack.json"),
        (damaged("missing", lambda p: (p / layer).unlink()), layer),
        (damaged("short", lambda p: os.truncate(p / layer, 5000)), layer),
        (damaged("config", lambda p: (p / "config.json").write_text("[]")), "config.json"),
        (damaged("kind", lambda p: (p / "config.json").write_text("{}")), 'no "model_type" in it'),
        (
            damaged("no config", lambda p: (p / "config.json").unlink()),
            "config.json: not usable (No such file or directory); ",
        ),
        (damaged("tokens", lambda p: (p / "tokenizer.json").write_text("{}")), "no tokenizer"),
    ):
        done = generate("--prompt", PROMPT, pack=pack)
        assert_refused(done, f".*{re.escape(said)}")
        assert done.err.count(str(pack)) == 1, done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(run: Run, pack_of: PackOf) -> None:
    for device, said in (
        ("cuda", "no device cuda: this machine has 0 CUDA devices"),
        ("cuda:7", "no device cuda:7"),
        ("tpu", "device 'tpu' is not known"),
        ("meta", "device 'meta' is not supported"),
    ):
        done = run("generate", pack_of("llama"), "--prompt", PROMPT, "--device", device)
        assert_refused(done, re.escape(said))


def test_with_hardly_any_memory_layers_come_from_disk(generate: Run) -> None:
    plain, streamed = generate("--prompt", PROMPT), generate("--prompt", PROMPT, "--ram", "1K")
    assert streamed.out == plain.out
    assert "; 0 B streamed a pass, 0 B in all]" in plain.err
    assert re.search(r"; \d+\.\d kB streamed a pass, \d+\.\d MB in all\]", streamed.err)


def assert_refused(done: Any, pattern: str) -> None:
    """Exit code 1 and one line that matches."""
    assert done.code == 1, done
    assert done.out == ""
    assert re.fullmatch(f"layerpack: error: {pattern}.*\n", done.err), done.err
