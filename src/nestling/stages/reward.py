"""Train the reward model: from rankings of several responses to one number per response."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field

from nestling.core.pipeline import StageContext
from nestling.core.types import Conversation, Ranking
from nestling.loading.chats import TooLong
from nestling.loading.preferences import RankingLoader
from nestling.model import checkpoint
from nestling.objectives import reward as objective_file
from nestling.stages._training import TrainingStage, figures, materials, optimise, read_split, save_model

VERSION = 1
READS = {"model": "sft", "rankings": "rankings", "conversations?": "conversations"}


class Settings(TrainingStage):
    """How rankings are learnt."""

    batch_prompts: int = Field(16, ge=1, description="Prompts per step, each with all its responses.")
    too_long: TooLong = Field("error", description="What happens to a response longer than the context.")
    references: int = Field(200, ge=0, description="Demonstrations whose mean score becomes zero.")
    objective: objective_file.Settings = objective_file.Settings()


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Train from the SFT model; report held-out accuracy against the labels and, where known, the noise-free truth."""
    stuff = materials(context)
    start = checkpoint.load(stuff.path("model"), context.runtime.device)
    held_out = read_split(context.reads["rankings"], "val", Ranking)
    train_rows = read_split(context.reads["rankings"], "train", Ranking)

    def loader(rows: list[Ranking]) -> RankingLoader:
        size, prompts = start.model.config.context, settings.batch_prompts
        return RankingLoader(rows, start.tokenizer, size, prompts, context.seed, too_long=settings.too_long)

    given: dict[str, Any] = {"rankings": loader(train_rows), "held_out": loader(held_out)}
    if (truth := objective_file.with_truth(held_out)) is not None:
        given["truth"] = loader(truth)
    objective = objective_file.build(settings.objective, replace(stuff, models={"model": start}, given=given))
    result = optimise(objective, settings.training, context)
    last = result.history[-1]
    report = {
        **figures(result),
        **{name.removeprefix("val_"): value for name, value in last.items() if name.startswith("val_")},
        "rankings": len(train_rows),
        "bars": settings.bars,
    }
    mean = _reference_mean(settings, context, objective, start.tokenizer)
    save_model(context, objective.model.decoder, start.tokenizer, report, objective.model.head, reward_mean=mean)
    return report | {"reward_mean": mean}


def _reference_mean(settings: Settings, context: StageContext, objective: Any, tokenizer: Any) -> float:
    """The mean score of demonstrations, 0 without any."""
    if "conversations" not in context.reads or not settings.references:
        return 0.0
    references = read_split(context.reads["conversations"], "val", Conversation)[: settings.references]
    return objective_file.reference_score(objective.model, tokenizer, references)
