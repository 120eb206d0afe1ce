"""Write docs/commands.md from the commands' own `--help`: `make docs`.

tests/test_docs.py fails while the page differs from what this writes.
"""

from __future__ import annotations

from pathlib import Path

import click

from layerpack.cli.main import layerpack

PAGE = Path(__file__).parent / "commands.md"
_WIDTH = 88


def render() -> str:
    """The page's text."""
    sections = [
        "# The commands\n\nWritten from their own `--help` by `make docs`.\n",
        _section("layerpack", layerpack, None),
    ]
    parent = click.Context(layerpack, info_name="layerpack", **layerpack.context_settings)
    for name in layerpack.list_commands(parent):
        command = layerpack.get_command(parent, name)
        assert command is not None
        sections.append(_section(f"layerpack {name}", command, parent))
    return "\n".join(sections)


def _section(title: str, command: click.Command, parent: click.Context | None) -> str:
    context = click.Context(
        command,
        info_name=title.rpartition(" ")[2],
        parent=parent,
        max_content_width=_WIDTH,
        terminal_width=_WIDTH,
        **layerpack.context_settings,
    )
    return f"## {title}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"{PAGE} written")
