"""The command `layerpack`: finds the subcommand, turns errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import click

from layerpack.cli.quick_imports import leave_to_the_system
from layerpack.formats.errors import LayerpackError
from layerpack.formats.machine_faults import machine_fault

_COMMANDS = {
    "convert": "Turn a checkpoint into a pack.",
    "generate": "Generate text with a pack.",
    "chat": "Talk with a pack in the terminal.",
    "serve": "Serve a pack over HTTP, as OpenAI's API.",
    "batch": "Answer a file of requests, many on each pass.",
    "eval": "Measure what a pack's text is worth: perplexity, divergence.",
    "calibrate": "Collect what a better conversion chooses its codes by.",
    "inspect": "Show what is in a pack.",
    "verify": "Re-read a pack and check every digest.",
    "plan": "Show where the layers of a pack would live on this machine.",
    "bench": "Time ways of streaming a pack on this machine.",
    "unpack": "Expand a compressed pack to a plain one.",
}
_ROOM = "layerpack.cli.commands"
FAILED, INTERRUPTED = 1, 130


class _LazyGroup(click.Group):
    """Imports a command's module only when that command runs: `--help` and inspect stay fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands whose modules exist, in the order of use."""
        return [
            name
            for name in _COMMANDS
            if importlib.util.find_spec(f"{_ROOM}.{name}_cmd") is not None
        ]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{_ROOM}.{cmd_name}_cmd")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `--help`, from the table above: nothing is imported."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name]) for name in self.list_commands(ctx)])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="layerpack", prog_name="layerpack")
def layerpack() -> None:
    """Run language models that do not fit into your GPU, at full 4-bit quality.

    `layerpack convert Qwen/Qwen2.5-72B-Instruct out/` makes a pack, `layerpack generate out/
    --prompt "…"` runs it, streaming what does not fit.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends in SystemExit: 0, 1 (failed), 2 (usage) or 130 (Ctrl-C).

    The one place where an error becomes one line; LAYERPACK_DEBUG=1 shows its traceback instead.
    """
    _open_standard_files()
    try:
        with _libraries_silent():
            sys.exit(layerpack.main(args=arguments, standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("layerpack: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except Exception as error:
        if os.environ.get("LAYERPACK_DEBUG"):
            raise
        click.echo(f"layerpack: error: {_one_line(error)}", err=True)
        sys.exit(FAILED)
    finally:
        if arguments is None:  # called by a program, it goes on
            leave_to_the_system()


@contextlib.contextmanager
def _libraries_silent() -> Iterator[None]:
    """In the block no warning and no log of a library gets into a text; LAYERPACK_DEBUG=1 lets it.

    What a user has to know, layerpack says itself.
    """
    if os.environ.get("LAYERPACK_DEBUG"):
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _open_standard_files() -> None:
    """Where the caller closed one of the three, the next file opened would take its place.

    A library's warning would then be written into a pack.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "…" is no error
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - as long as the process


def _one_line(error: Exception) -> str:
    if fault := machine_fault(error):
        return fault
    text = " ".join(str(error).split())
    if isinstance(error, LayerpackError):
        return text
    if isinstance(error, OSError):
        return f"{error.filename or 'input/output'}: {error.strerror or text}"
    kind = type(error).__name__
    return f"unforeseen {kind}: {text}; LAYERPACK_DEBUG=1 shows where it came from"


if __name__ == "__main__":
    main()
