"""Verbs that talk to a model: `nestling chat MODEL` and `nestling generate MODEL PROMPT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.chat import ChatOptions, run_chat
from nestling.cli.opening import open_writer
from nestling.core.config import parse
from nestling.core.metrics import say
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="A run, checkpoint or Hugging Face folder.")]


def chat(
    model: ModelArgument,
    tool: Annotated[list[str] | None, typer.Option(help="A file of tools/ to offer; may be given again.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    scripted: Annotated[bool, typer.Option("--scripted", help="Print a short scripted conversation.")] = False,
) -> None:
    """Talk to a model in the terminal."""
    tools = tuple(tool or ChatOptions.tools)
    run_chat(model, ChatOptions(tools=tools, device=device, scripted=scripted or None))


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to continue; no conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0 keeps all.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(help="The likeliest tokens that reach this probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Drives the choice.")] = 1,
    count: Annotated[int, typer.Option(help="How many continuations.", min=1)] = 1,
    strategy: Annotated[str, typer.Option(help="A file of generation/strategies.")] = "sample",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Continue a text."""
    found = open_writer(model, device)
    engine = Engine(found.model, found.tokenizer, frozen=True)
    given = {"strategy": strategy, "temperature": temperature, "top_k": top_k, "top_p": top_p, "max_tokens": max_tokens}
    sampling = parse(Sampling, given, "generate")
    if found.tokenizer.special:
        ids = [found.tokenizer.start_of_text, *found.tokenizer.encode(prompt)]
    else:  # a bare alphabet, such as nanoGPT's: nothing marks the beginning of a text
        ids = found.tokenizer.encode(prompt or "\n")
    for done in engine.generate([Request(ids, sampling, seed + place) for place in range(count)]):
        print(f"{prompt}{done.text}", end="\n" if count == 1 else "\n\n")
        if done.finish == "length":
            say(f"(stopped after {len(done.ids)} tokens)")
