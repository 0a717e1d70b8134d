"""Supervised fine-tuning: teach the base model to answer, with the loss on what the assistant writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field

from nestling.core.pipeline import StageContext
from nestling.core.runtime import torch_stream
from nestling.core.types import Conversation
from nestling.loading.chats import ChatLoader, TooLong
from nestling.model import checkpoint
from nestling.model.checkpoint import Checkpoint
from nestling.objectives import next_token
from nestling.stages._training import TrainingStage, figures, materials, optimise, read_split, save_model
from nestling.tokenizer.special import CHAT

VERSION = 1
READS = {"model": "pretrain", "conversations": "conversations"}


class Settings(TrainingStage):
    """How conversations are learnt."""

    batch_rows: int = Field(16, ge=1, description="Packed rows per step, over all ranks.")
    too_long: TooLong = Field("error", description="What happens to a conversation longer than the context.")
    objective: next_token.Settings = next_token.Settings()


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Add the chat tokens to the base model, then train on packed conversations."""
    stuff = materials(context)
    base = with_chat_tokens(checkpoint.load(stuff.path("model"), context.runtime.device), context.seed)
    size = base.model.config.context
    loaders = {
        split: ChatLoader(
            read_split(context.reads["conversations"], split, Conversation),
            base.tokenizer,
            size,
            settings.batch_rows,
            context.seed,
            too_long=settings.too_long,
        )
        for split in ("train", "val")
    }
    given = {"batches": loaders["train"], "validation": loaders["val"].validation}
    objective = next_token.build(settings.objective, replace(stuff, models={"model": base}, given=given))
    result = optimise(objective, settings.training, context)
    report = {
        **figures(result),
        "val_loss": result.history[-1].get("val_loss"),
        "conversations": loaders["train"].conversations,
        "dropped": loaders["train"].dropped,
        "cut": loaders["train"].cut,
        "row_fill": round(loaders["train"].fill, 4),
        "epochs": round(settings.training.steps * settings.batch_rows / loaders["train"].row_count, 3),
        "bars": settings.bars,
    }
    save_model(context, objective.model, base.tokenizer, report)
    return report


def with_chat_tokens(base: Checkpoint, seed: int) -> Checkpoint:
    """The checkpoint with the conversation's control tokens; a chat model has them already."""
    tokenizer = base.tokenizer.with_special(CHAT)
    if tokenizer.vocab_size > base.model.config.vocab_size:
        base.model.resize_vocabulary(tokenizer.vocab_size, torch_stream(seed, "chat tokens"))
    return replace(base, tokenizer=tokenizer)
