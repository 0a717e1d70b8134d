"""Verbs that carry models to other programs: `nestling export` and `nestling verify-export`."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nestling.cli.models import ModelArgument
from nestling.cli.opening import open_writer
from nestling.core.metrics import say
from nestling.core.runtime import detect
from nestling.interop.agreement import Agreement, compare, conversations, reference_cases
from nestling.interop.gguf import export_gguf
from nestling.interop.readers import open_readers
from nestling.model import checkpoint, peft
from nestling.model.locate import checkpoint_folder

SHOWN_COMPLAINTS = 5


def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="A file that ends in .gguf, or a new folder for transformers and vLLM.")],
    type_: Annotated[str, typer.Option("--type", help="Of a GGUF file: f32, f16, bf16 or q8_0.")] = "f16",
) -> None:
    """Write a model for llama.cpp (one .gguf file), or copy its checkpoint folder."""
    found = open_writer(model, "cpu")
    if out.suffix == ".gguf":
        export_gguf(found, out, type_, name=checkpoint_folder(model).resolve().name)  # type: ignore[arg-type]
    else:
        checkpoint.save(out, found.model, found.tokenizer, found.provenance)
    say(f"wrote {out}")


def verify_export(
    model: ModelArgument,
    prompts: Annotated[int, typer.Option(help="How many prompts to ask.", min=1)] = 50,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each greedy continuation.", min=1)] = 32,
    type_: Annotated[str, typer.Option("--type", help="Of the GGUF file: f32, f16, bf16 or q8_0.")] = "f32",
) -> None:
    """Show that engine, transformers and llama.cpp answer as the trainer does; exit code 1 where they don't."""
    found = open_writer(model, "cpu")
    folder = checkpoint_folder(model)
    chats = found.tokenizer.chat_template is not None
    asked = conversations(prompts, chat=chats, tools=chats and found.tokenizer.takes_tools)
    cases = reference_cases(found, asked, new_tokens)
    if len(cases) < len(asked):
        what = "don't fit the model's context or chat template and are left out"
        say(f"{len(asked) - len(cases)} of {len(asked)} prompts {what}")
    with tempfile.TemporaryDirectory() as workplace, _only_our_words():
        if peft.is_adapter(folder):  # the others read the merged model, as export writes it
            folder = Path(workplace) / "merged"
            checkpoint.save(folder, found.model, found.tokenizer)
        readers, absent = open_readers(found, folder, Path(workplace), type_, detect("cpu").threads)  # type: ignore[arg-type]
        results = [compare(reader, cases, new_tokens) for reader in readers]
    _show(checkpoint_folder(model), results, absent)
    if not all(result.agrees for result in results):
        raise SystemExit(1)


@contextmanager
def _only_our_words() -> Iterator[None]:
    """Keep to itself what libraries log and warn of while they are imported and asked: it is not about the model."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _show(folder: Path, results: list[Agreement], absent: dict[str, str]) -> None:
    """The table, then what is wrong."""
    table = Table(title=f"{folder}: against the trainer (differences in nats)")
    for name in ("reader", "same tokens", "difference", "allowed", "same replies", "ties", ""):
        is_reader = name == "reader"
        table.add_column(name, justify="left" if is_reader else "right", no_wrap=is_reader)
    for r in results:
        counts = (f"{r.same_ids} of {r.prompts}", f"{r.largest_difference:.2g}", f"{r.tolerance:g}")
        verdict = "agrees" if r.agrees else "DIFFERS"
        table.add_row(r.name, *counts, f"{r.same_replies} of {r.prompts}", str(r.ties), verdict)
    for name, reason in absent.items():
        table.add_row(name, *[""] * 5, "not asked")
        say(f"{name}: {reason}")
    Console(highlight=False).print(table)
    for r in results:
        for line in r.complaints[:SHOWN_COMPLAINTS]:
            say(f"{r.name}: {line}")
        if len(r.complaints) > SHOWN_COMPLAINTS:
            say(f"{r.name}: and {len(r.complaints) - SHOWN_COMPLAINTS} more")
