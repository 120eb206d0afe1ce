"""What `layerpack chat` does once its options are known; imported late, as it needs torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from layerpack.cli.options.memory import limits_of
from layerpack.cli.options.sampling import sampling_of
from layerpack.cli.sign_of_life import SignOfLife
from layerpack.formats.disk import write_whole
from layerpack.formats.errors import LayerpackError, PromptError
from layerpack.formats.jsontext import parse_json
from layerpack.formats.pack import Pack
from layerpack.runtime.engine.options import MOST_DRAFT_TOKENS, GenerateOptions
from layerpack.runtime.generate import Generation
from layerpack.runtime.measure.remembered import cache_file
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions

HELP = """\
/system TEXT   another system message (none: leave it out)
/undo          take the last turn back
/retry         another answer to the last turn
/save FILE     write the conversation as JSON
/load FILE     go on with one
/stats         what the last answer took
/help          this list
/exit          end it; so does the end of the input"""
Read = Callable[[], str]


class Conversation:
    """The messages so far, and what was said of them."""

    def __init__(self, model: Model, options: GenerateOptions, system: str | None) -> None:
        self._model, self._options = model, options
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.last: Generation | None = None
        self._retries = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat template takes them."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, *self.turns]

    def say(self, text: str, on_text: Callable[[str], None], life: SignOfLife) -> Generation:
        """A turn, and its answer; what there is of it after Ctrl-C. Raises LayerpackError."""
        self._retries = 0
        self.turns.append({"role": "user", "content": text})
        return self._answer(on_text, life)

    def retry(self, on_text: Callable[[str], None], life: SignOfLife) -> Generation:
        """Another answer to the last turn: with another seed. Raises LayerpackError."""
        if not self.turns:
            raise PromptError("there is no turn to answer again")
        if self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        self._retries += 1
        return self._answer(on_text, life)

    def undo(self) -> None:
        """Without the last turn and its answer. Raises PromptError."""
        if not self.turns:
            raise PromptError("there is no turn to take back")
        while self.turns.pop()["role"] != "user":
            continue

    def _answer(self, on_text: Callable[[str], None], life: SignOfLife) -> Generation:
        options = self._options
        if options.seed is not None:
            options = replace(options, seed=options.seed + self._retries)
        try:
            done = self._model.generate(
                self.messages,
                options,
                on_text=on_text,
                on_wait=lambda at: life.bar("the first pass", at.done, at.total, "layers"),
            )
        except LayerpackError:
            self.turns.pop()  # it was never answered
            raise
        self.turns.append({"role": "assistant", "content": done.text})
        self.last = done
        return done

    def save(self, path: Path) -> None:
        """Write it. Raises OSError."""
        write_whole(path, json.dumps(self.messages, ensure_ascii=False, indent=1).encode())

    def load(self, path: Path) -> None:
        """Read one in place of this. Raises PromptError, OSError."""
        try:
            found = parse_json(path.read_bytes())
            if not isinstance(found, list):
                raise ValueError("no list")
            said = [{"role": str(m["role"]), "content": str(m["content"])} for m in found]
        except (ValueError, KeyError, TypeError) as reason:
            raise PromptError(f"{path}: not a conversation that /save wrote") from reason
        self.system = None
        if said and said[0]["role"] == "system":
            self.system = said.pop(0)["content"]
        self.turns = said


def run(
    path: Path, options: dict[str, Any], life: SignOfLife, *, on_open: Callable[[], object]
) -> int:
    """Talk until the end; the exit code. Raises LayerpackError."""
    how = OpenOptions(
        device=options["device"],
        limits=limits_of(options),
        context_tokens=options["context"],
        draft=options["draft"],
        proposed_tokens=MOST_DRAFT_TOKENS if options["draft"] else 0,
    )
    wanted = GenerateOptions(
        max_new_tokens=options["max_new_tokens"],
        **sampling_of(options),
        template_arguments=options["template_arguments"],
    )
    with Model.open(Pack.open(path), how) as model:
        on_open()
        life.over()
        conversation = Conversation(model, wanted, options["system"])
        if options["load"] is not None:
            conversation.load(options["load"])
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        for text in _turns(_reader(is_terminal)):
            _turn(conversation, text, life, is_terminal=is_terminal)
    return 0


def _turn(conversation: Conversation, text: str, life: SignOfLife, *, is_terminal: bool) -> None:
    """One line of the user's; what is wrong with it is said, and the conversation goes on."""

    def show(piece: str) -> None:
        life.over()
        click.echo(piece, nl=False)

    command, _, rest = text.partition(" ")
    rest = rest.strip()
    try:
        if command == "/help":
            click.echo(HELP, err=True)
        elif command == "/system":
            conversation.system = rest or None
        elif command == "/undo":
            conversation.undo()
        elif command in ("/save", "/load"):
            if not rest:
                raise PromptError(f"{command}: give the name of a file")
            (conversation.save if command == "/save" else conversation.load)(Path(rest))
        elif command == "/stats":
            click.echo(_stats(conversation), err=True)
        elif command.startswith("/") and command != "/retry" and is_terminal:
            raise PromptError(f"{command}: no such command; /help lists them")
        else:
            life.say("the first pass …")
            if command == "/retry":
                done = conversation.retry(show, life)
            else:
                done = conversation.say(text, show, life)
            life.over()
            click.echo(" …" if done.finish == "interrupted" else "")
    except LayerpackError as error:
        life.over()
        click.echo(f"layerpack: {error}", err=True)
    except OSError as error:
        life.over()
        click.echo(f"layerpack: {error.filename}: {error.strerror}", err=True)


def _stats(conversation: Conversation) -> str:
    done = conversation.last
    if done is None:
        return "nothing was answered yet"
    each = done.seconds / max(1, len(done.token_ids))
    return (
        f"{done.prompt_tokens} tokens of prompt, {done.cached_tokens} of them known; "
        f"{len(done.token_ids)} tokens in {done.seconds:.1f} s, {each:.3f} s a token; "
        f"{done.passes} passes, {done.tokens_per_pass:.1f} tokens a pass"
    )


def _turns(read: Read) -> Iterator[str]:
    """What the user says; a line that ends with a backslash goes on with the next."""
    lines: list[str] = []
    while True:
        try:
            line = read()
        except EOFError:
            break
        except KeyboardInterrupt:  # a line is given up, not the conversation
            lines.clear()
            continue
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        text = "\n".join([*lines, line])
        lines.clear()
        if text.strip() in ("/exit", "/quit"):
            break
        if text.strip():
            yield text if "\n" in text else text.strip()


def _reader(is_terminal: bool) -> Read:
    if not is_terminal:

        def from_pipe() -> str:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\r\n")

        return from_pipe
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    file = cache_file().with_name("chat-history")
    file.parent.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(file)))
    return lambda: session.prompt("> ")
