"""The frame of the command line: what it imports, how it ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from support.runs.imports import imported_by

from layerpack.cli import main as cli
from layerpack.formats.errors import SourceError


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "layerpack.cli.main", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[BaseException], tuple[object, str]]:
    """Exit code and standard error of a command that raises the given exception."""

    def get(raised: BaseException) -> tuple[object, str]:
        @click.command()
        def broken() -> None:
            raise raised

        monkeypatch.setattr(cli._LazyGroup, "get_command", lambda *_: broken)
        with pytest.raises(SystemExit) as ended:
            cli.main(["broken"])
        return ended.value.code, capsys.readouterr().err

    return get


Ends = Callable[[BaseException], tuple[object, str]]


def test_help_imports_no_command_and_no_heavy_package() -> None:
    modules, output = imported_by("--help")
    assert not {"torch", "transformers", "numpy", "huggingface_hub", "tqdm"} & modules
    assert not [name for name in modules if name.endswith("_cmd")]
    for name in ("convert", "generate"):
        assert f"\n  {name} " in output


def test_every_listed_command_can_be_imported_and_has_help() -> None:
    context = click.Context(cli.layerpack)
    names = cli.layerpack.list_commands(context)
    assert {"convert", "generate"} <= set(names)
    for name in names:
        command = cli.layerpack.get_command(context, name)
        assert command is not None and command.name == name
        assert command.get_short_help_str()


def test_version_and_usage_errors() -> None:
    assert run("--version").stdout.startswith("layerpack, version 0.")
    for arguments in (["convert"], ["no-such-command"], ["convert", "--no-such-option"]):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert "Error: " in done.stderr and "Traceback" not in done.stderr


def test_an_error_of_ours_is_one_line_and_exit_code_1(ends: Ends) -> None:
    assert ends(SourceError("a.gguf: not a\nGGUF file")) == (
        1,
        "layerpack: error: a.gguf: not a GGUF file\n",
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_system_error_names_the_file(ends: Ends, number: int) -> None:
    code, text = ends(OSError(number, os.strerror(number), "out/layer-003.safetensors"))
    assert code == 1
    assert text == f"layerpack: error: out/layer-003.safetensors: {os.strerror(number)}\n"


def test_what_nobody_foresaw_is_one_line_too(ends: Ends) -> None:
    code, text = ends(ZeroDivisionError("division by zero"))
    assert code == 1
    assert text.startswith("layerpack: error: unforeseen ZeroDivisionError: division by zero; ")
    assert text.count("\n") == 1


def test_ctrl_c_ends_with_130(ends: Ends) -> None:
    code, text = ends(KeyboardInterrupt())
    assert (code, text.strip()) == (130, "layerpack: interrupted")


def test_debug_shows_the_traceback(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERPACK_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())


@pytest.mark.parametrize("closed", [(2,), (0, 2), (0, 1, 2)])
def test_closed_standard_files_change_no_result(
    closed: tuple[int, ...], pack_of: Callable[..., Path]
) -> None:
    closing = "".join(f"os.close({number});" for number in closed)
    code = (
        f"import os,sys; {closing} os.execv(sys.executable, [sys.executable, '-m', "
        f"'layerpack.cli.main', 'verify', {str(pack_of('llama'))!r}])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("encoding", ["latin-1", "cp437"])
def test_output_that_cannot_hold_a_character_gets_another(
    encoding: str, pack_of: Callable[..., Path]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "layerpack.cli.main", "inspect", str(pack_of("llama"))],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr
    assert "layer-000" in done.stdout.decode(encoding)
