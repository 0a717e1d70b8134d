"""Verbs that make a Hugging Face folder of something else: `nestling import` and `nestling merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nestling.cli.models import ModelArgument
from nestling.core.errors import UserError
from nestling.core.metrics import say
from nestling.interop.importing import import_checkpoint
from nestling.model import checkpoint, peft
from nestling.model.locate import checkpoint_folder

OutOption = Annotated[Path, typer.Option(help="The folder to write.")]


def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A checkpoint file, or the folder it lies in.")],
    out: OutOption,
    tokenizer: Annotated[Path | None, typer.Option(help="Its tokenizer, where it does not lie beside it.")] = None,
    activation: Annotated[
        Literal["", "gelu", "gelu_new"], typer.Option(help="Of a nanoGPT: gelu, or gelu_new before March 2023.")
    ] = "",
) -> None:
    """Read a checkpoint of GPT-2's form, nanoGPT or llama2.c, and write it as a Hugging Face folder."""
    found, read = import_checkpoint(source, tokenizer, activation)
    checkpoint.save(out, found.model, found.tokenizer, found.provenance)
    config = found.model.config
    sizes = f"{config.n_layers} layers, d_model {config.d_model}, {config.n_heads} heads, context {config.context}"
    say(f"read a {read.kind}: {found.model.parameter_count():,} parameters, {sizes}")
    for remark in read.remarks:
        say(remark)
    spare = config.vocab_size - found.tokenizer.vocab_size
    say(
        f"tokenizer of {found.tokenizer.vocab_size:,} ids" + (f"; {spare} rows of the model have none" if spare else "")
    )
    say(f"wrote {out}")


def merge(model: ModelArgument, out: OutOption) -> None:
    """Add the adapters of a model to its weights, and write it as a plain Hugging Face folder."""
    folder = checkpoint_folder(model)
    if not peft.is_adapter(folder):
        raise UserError("this model has no adapters to merge", where=folder, fix="use it as it is")
    base = peft.base_folder(folder)
    if out.resolve() in (folder.resolve(), base):
        raise UserError("the adapter still needs this folder", where="--out", value=str(out), fix="choose another one")
    found = checkpoint.load(folder)
    checkpoint.save(out, found.model, found.tokenizer, found.provenance, found.head)
    say(f"merged {folder} into {base}, wrote {out}")
