"""Supervised fine-tuning: teach the base model to answer, with the loss on what the assistant writes."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from pydantic import Field

from nestling.core.pipeline import StageContext
from nestling.core.runtime import torch_stream
from nestling.core.types import Conversation
from nestling.loading.chats import ChatLoader, TooLong
from nestling.loading.repeats import Counted
from nestling.model.checkpoint import Checkpoint
from nestling.model.config import DecoderConfig
from nestling.objectives import next_token
from nestling.planning.work import Known, Work
from nestling.stages._training import Adaptable, figures, materials, optimise, read_split, save_model, starting_model
from nestling.tokenizer.special import CHAT
from nestling.tokenizer.template import own_template
from nestling.training.health import Expected

VERSION = 2
READS = {"model": "pretrain", "conversations": "conversations"}


class Settings(Adaptable):
    """How conversations are learnt."""

    batch_rows: int = Field(16, ge=1, description="Packed rows per step, over all ranks.")
    too_long: TooLong = Field("error", description="What happens to a conversation longer than the context.")
    objective: next_token.Settings = next_token.Settings()


def work(settings: Settings, known: Known) -> Work | None:
    """What a step reads: packed rows as long as the context."""
    if not isinstance(model := known.get("model"), DecoderConfig):
        return None
    model = model.with_(vocab_size=model.vocab_size + len(CHAT))
    sizes = (settings.training.steps, settings.batch_rows, model.context)
    pieces = settings.objective.microbatches
    return Work((model,), *sizes, microbatches=pieces, packed=True, adapters=settings.adapters)


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Add the chat tokens to the base model, then train on packed conversations."""
    stuff = materials(context)
    base = starting_model(settings, context, "model", lambda found: with_chat_tokens(found, context.seed))
    size = base.model.config.context
    loaders = {
        split: ChatLoader(
            read_split(context.reads["conversations"], split, Conversation, base.tokenizer),
            base.tokenizer,
            size,
            settings.batch_rows,
            context.seed,
            too_long=settings.too_long,
        )
        for split in ("train", "val")
    }
    counted = Counted(loaders["train"])
    given = {"batches": counted, "validation": loaders["val"].validation}
    objective = next_token.build(settings.objective, replace(stuff, models={"model": base}, given=given))
    chance = Expected(chance=math.log(base.tokenizer.vocab_size))
    result = optimise(
        objective, settings.training, context, expected=chance, work=work(settings, {"model": base.model.config})
    )
    epochs = settings.training.steps * settings.batch_rows / loaders["train"].row_count
    report = {
        **figures(result),
        "val_loss": result.history[-1].get("val_loss"),
        "conversations": loaders["train"].conversations,
        "dropped": loaders["train"].dropped,
        "cut": loaders["train"].cut,
        "row_fill": round(loaders["train"].fill, 4),
        "epochs": round(epochs, 3),
        "repeated_share": counted.repeated_share(epochs),
        "expected": asdict(chance),
        "bars": settings.bars,
    }
    save_model(context, objective.model, base.tokenizer, report)
    return report


def with_chat_tokens(base: Checkpoint, seed: int) -> Checkpoint:
    """The checkpoint with the conversation's control tokens; a chat model has them already, or a form of its own."""
    if base.tokenizer.chat_template not in (None, own_template()):
        return base
    tokenizer = base.tokenizer.with_special(CHAT)
    if tokenizer.vocab_size > base.model.config.vocab_size:
        base.model.resize_vocabulary(tokenizer.vocab_size, torch_stream(seed, "chat tokens"))
    return replace(base, tokenizer=tokenizer)
