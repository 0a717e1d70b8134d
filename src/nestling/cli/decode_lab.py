"""`nestling decode-lab MODEL PROMPT`: several ways of decoding side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nestling.cli.models import ModelArgument
from nestling.cli.opening import open_writer
from nestling.core.types import Message
from nestling.generation import lab
from nestling.generation.engine import Engine
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render

SHADES = (
    (0.5, "p ≥ 1/2", "default"),
    (0.1, "≥ 1/10", "green"),
    (0.01, "≥ 1/100", "yellow"),
    (0.0, "less", "bold red"),
)
"""Least probability, its name, and the colour of a token that has it."""


def decode_lab(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="What to go on from; a chat model is asked it.")],
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method, 'all', or settings: top_p=0.5,temperature=2; may be given again."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Texts of each method, for its figures.", min=1, max=256)] = 8,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.", min=1)] = 60,
    seed: Annotated[int, typer.Option(help="Drives the choice.")] = 1,
    reference: Annotated[str, typer.Option(help="How a person goes on; its figures stand beside the others.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, also with a chat model.")] = False,
    form: Annotated[Literal["table", "markdown", "json"], typer.Option(help="What to print.")] = "table",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Compare ways of decoding on one prompt."""
    found = open_writer(model, device)
    methods = _methods(method or list(lab.USUAL))
    engine = Engine(found.model, found.tokenizer, rows=lab.rows(methods, samples), frozen=True)
    ids = _ids(found.tokenizer, prompt, raw)
    results = [lab.reference(engine, ids, reference)] if reference else []
    results += lab.compare(engine, ids, methods, samples=samples, max_tokens=max_tokens, seed=seed)
    if form == "table":
        _show(results)
    elif form == "markdown":
        print(lab.markdown(prompt, results), end="")
    else:
        print(json.dumps(lab.plain(prompt, results), ensure_ascii=False, indent=2))


def _methods(words: Sequence[str]) -> list[lab.Method]:
    names = [name for word in words for name in (lab.METHODS if word == "all" else [word])]
    return [lab.method(name) for name in names]


def _ids(tokenizer: Tokenizer, prompt: str, raw: bool) -> list[int]:
    """A chat model is asked; a base model goes on."""
    if tokenizer.chat_template is not None and not raw:
        return render(tokenizer, [Message(role="user", content=prompt)], prompt=True).ids
    return [tokenizer.start_of_text, *tokenizer.encode(prompt)]


def _show(results: Sequence[lab.Result]) -> None:
    """A table on standard output, and what it says."""
    table = Table(show_lines=True)
    for name in lab.COLUMNS:
        figure = name not in ("method", "text")
        table.add_column(name, justify="right" if figure else "left", no_wrap=figure, overflow="fold")
    for result in results:
        name, *figures, _ = lab.row(result)
        about = "".join(f"\n{line}" for line in (result.method.idea, _settings(result.method)) if line)
        table.add_row(Text.assemble((name, "bold"), (about, "dim")), *figures, _coloured(result.scored))
    console = Console(highlight=False)
    console.print(table)
    colours = Text.assemble("token: ", *((f" {name} ", style) for _, name, style in SHADES))
    console.print(colours)
    for line in [*lab.LEGEND, *lab.lessons(results)]:
        console.print(line, soft_wrap=True)


def _settings(method: lab.Method) -> str:
    """The settings behind a name; nothing where they are the name."""
    return lab.settings(method) if method.name in lab.METHODS else ""


def _coloured(scored: Sequence[tuple[str, float]]) -> Text:
    """Each token in the colour of its probability."""
    text = Text()
    for piece, logprob in scored:
        text.append(piece, next(style for least, _, style in SHADES if math.exp(logprob) >= least))
    return text
