"""The documents say what the code does: commands, options, links, versions."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from layerpack.cli.main import layerpack

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_COMMAND = re.compile(r"\blayerpack ([a-z]+)((?:[^`\n]|\\\n)*)")


def commands_page() -> str:
    spec = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "commands.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.render())


def test_the_page_of_commands_is_their_own_help() -> None:
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == commands_page(), "run `make docs`"


def test_every_option_is_explained() -> None:
    context = click.Context(layerpack)
    for name in layerpack.list_commands(context):
        command = layerpack.get_command(context, name)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"layerpack {name} {option.opts[0]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return
    context = click.Context(layerpack)
    for name, rest in _COMMAND.findall(page.read_text(encoding="utf-8")):
        if name not in layerpack.list_commands(context):
            continue  # a sentence about layerpack, not a command
        command = layerpack.get_command(context, name)
        assert command is not None
        known = {"--help", *(o for p in command.params for o in (*p.opts, *p.secondary_opts))}
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest):
            assert option in known, f"layerpack {name} {option}"


def test_the_changelog_has_this_version() -> None:
    assert f"\n## {version('layerpack')}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"`make ([a-z]+)`", page.read_text(encoding="utf-8")):
            assert f"\n{target}:" in makefile, f"{page.name}: make {target}"
