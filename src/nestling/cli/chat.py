"""Chat in the terminal: words stream in, tools are shown dim, lines that begin with / are commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nestling.cli.opening import open_writer
from nestling.core.errors import UserError
from nestling.core.types import Message
from nestling.generation.engine import Engine
from nestling.generation.session import CHAT_SAMPLING, ChatSession, Event

SCRIPT = (
    "Hello! Who are you?",
    "What is 123 + 456?",
    "Tell me a short story.",
    "Who is Zorblax of Quuxville?",
)
HELP = """/system [text]   show or set the system message (starts the conversation anew)
/reset           forget the conversation
/regenerate      answer the last message again
/params [k v]    show the sampling parameters, or set one: /params temperature 0.5
/save FILE       write the conversation as JSONL
/history         show the conversation
/help            this list
/quit            leave (or Ctrl-D)"""


@dataclass(frozen=True)
class ChatOptions:
    """How to chat."""

    system: str = ""
    tools: tuple[str, ...] = ("calculator",)
    seed: int = 0
    device: str = "auto"
    params: dict[str, object] = field(default_factory=dict)
    """Changes to the sampling parameters, such as {"temperature": 0}."""
    scripted: bool | None = None
    """Hold the short conversation `SCRIPT`; None: when standard input is not a terminal."""
    script: tuple[str, ...] = SCRIPT


def run_chat(folder: Path, options: ChatOptions | None = None, console: Console | None = None) -> None:
    """Chat with the model of a checkpoint folder until /quit, or hold the scripted conversation.

    Raises:
        UserError: no chat model in the folder.
    """
    options = options or ChatOptions()
    console = console or Console(highlight=False)
    session = _open(folder, options)
    scripted = not sys.stdin.isatty() if options.scripted is None else options.scripted
    if scripted:
        _play(session, options.script, console)
    else:
        size = session.engine.model.parameter_count()
        console.print(Text(f"{folder} · {size:,} parameters · /help lists commands", "dim"))
        _converse(session, console)


def _open(folder: Path, options: ChatOptions) -> ChatSession:
    checkpoint = open_writer(folder, options.device)
    if checkpoint.tokenizer.chat_template is None:
        fix = "fine-tune it on conversations (sft), or use nestling generate"
        raise UserError("this is a base model: it continues text, it does not chat", where=folder, fix=fix)
    engine = Engine(checkpoint.model, checkpoint.tokenizer, rows=4, frozen=True)
    session = ChatSession(engine, system=options.system, tools=options.tools, sampling=CHAT_SAMPLING, seed=options.seed)
    for name, value in options.params.items():
        session.set(name, value)
    return session


def _play(session: ChatSession, script: Sequence[str], console: Console) -> None:
    for line in script:
        console.print(Text.assemble(("you  ", "bold cyan"), line))
        _show(session.say(line), console)


def _converse(session: ChatSession, console: Console) -> None:
    while True:
        try:
            line = console.input("[bold cyan]you[/]  ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                _command(session, line, console)
            elif line:
                _show(session.say(line), console)
        except UserError as error:
            console.print(Text(f"error: {error}", "red"))


def _show(events: Generator[Event, None, None], console: Console) -> None:
    """Print a reply as it comes; Ctrl-C ends the reply, not the chat."""
    console.print(Text("bot  ", "bold green"), end="")
    try:
        for event in events:
            if event.kind == "text":
                console.print(Text(event.text), end="", soft_wrap=True)
            else:
                mark = {"call": " ⚙ ", "result": " → ", "thought": " … "}[event.kind]
                console.print(Text(f"{mark}{event.text} ", "dim"), end="", soft_wrap=True)
    except KeyboardInterrupt:
        console.print(Text(" (interrupted)", "dim"), end="")
    finally:
        events.close()
    console.print()


def _command(session: ChatSession, line: str, console: Console) -> None:
    name, _, rest = line[1:].partition(" ")
    if name not in _COMMANDS:
        raise UserError("no such command", value=f"/{name}", fix="/help lists them")
    _COMMANDS[name](session, rest.strip(), console)


def _system(session: ChatSession, rest: str, console: Console) -> None:
    if rest:
        session.system = rest
        session.reset()
    console.print(Text(session.system or "(no system message)", "dim"))


def _reset(session: ChatSession, rest: str, console: Console) -> None:
    session.reset()
    console.print(Text("(new conversation)", "dim"))


def _regenerate(session: ChatSession, rest: str, console: Console) -> None:
    _show(session.regenerate(), console)


def _params(session: ChatSession, rest: str, console: Console) -> None:
    if rest:
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        session.set(name, value.strip())
    for name, value in session.sampling.model_dump().items():
        console.print(Text(f"{name:20} {value}", "dim"))


def _save(session: ChatSession, rest: str, console: Console) -> None:
    if not rest:
        raise UserError("/save needs a file name", fix="/save talk.jsonl")
    session.save(rest)
    console.print(Text(f"saved {len(session.messages)} messages to {rest}", "dim"))


def _history(session: ChatSession, rest: str, console: Console) -> None:
    for message in session.messages:
        console.print(Text.assemble((f"{message.role:10}", "bold"), _readable(message)))


def _readable(message: Message) -> str:
    return " ".join([message.content, *(f"⚙ {call.name} {call.arguments}" for call in message.tool_calls)])


def _help(session: ChatSession, rest: str, console: Console) -> None:
    console.print(Text(HELP, "dim"))


_COMMANDS: dict[str, Callable[[ChatSession, str, Console], None]] = {
    "system": _system,
    "reset": _reset,
    "regenerate": _regenerate,
    "params": _params,
    "save": _save,
    "history": _history,
    "help": _help,
}
