"""Train the reward model: from rankings of several responses to one number per response."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any, ClassVar

from pydantic import Field

from nestling.core.pipeline import StageContext
from nestling.core.types import Conversation, Ranking
from nestling.loading.chats import TooLong
from nestling.loading.preferences import RankingLoader
from nestling.model.config import DecoderConfig
from nestling.objectives import reward as objective_file
from nestling.planning.work import Known, Work
from nestling.stages._preflight import measured
from nestling.stages._training import Adaptable, figures, materials, optimise, read_split, save_model, starting_model
from nestling.training.health import Expected

VERSION = 1
READS = {"model": "sft", "rankings": "rankings", "conversations?": "conversations"}

RESPONSES = 4
"""To a prompt, in a plan made before the rankings are there."""


class Settings(Adaptable):
    """How rankings are learnt."""

    batch_prompts: int = Field(16, ge=1, description="Prompts per step, each with all its responses.")
    too_long: TooLong = Field("error", description="What happens to a response longer than the context.")
    references: int = Field(200, ge=0, description="Demonstrations whose mean score becomes zero.")
    objective: objective_file.Settings = objective_file.Settings()
    regular: ClassVar[bool] = objective_file.Reward.fixed_shapes


def work(settings: Settings, known: Known) -> Work | None:
    """What a step reads, before the rankings are known: some responses to each prompt, each as long as the context."""
    if not isinstance(model := known.get("model"), DecoderConfig):
        return None
    responses = RESPONSES * settings.batch_prompts
    pieces = settings.objective.microbatches
    sizes = (settings.training.steps, responses, model.context)
    return Work((model,), *sizes, microbatches=pieces, logits=False, exact=False, adapters=settings.adapters)


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Train from the SFT model; report held-out accuracy against the labels and, where known, the noise-free truth."""
    stuff = materials(context)
    start = starting_model(settings, context, "model")
    held_out = read_split(context.reads["rankings"], "val", Ranking, start.tokenizer)
    train_rows = read_split(context.reads["rankings"], "train", Ranking, start.tokenizer)

    def loader(rows: list[Ranking]) -> RankingLoader:
        size, prompts = start.model.config.context, settings.batch_prompts
        return RankingLoader(rows, start.tokenizer, size, prompts, context.seed, too_long=settings.too_long)

    given: dict[str, Any] = {"rankings": loader(train_rows), "held_out": loader(held_out)}
    if (truth := objective_file.with_truth(held_out)) is not None:
        given["truth"] = loader(truth)
    objective = objective_file.build(settings.objective, replace(stuff, models={"model": start}, given=given))
    guessing = Expected(chance=math.log(2))
    reading = measured(work(settings, {"model": start.model.config}), given["rankings"])
    result = optimise(objective, settings.training, context, expected=guessing, work=reading)
    last = result.history[-1]
    report = {
        **figures(result),
        **{name.removeprefix("val_"): value for name, value in last.items() if name.startswith("val_")},
        "rankings": len(train_rows),
        "expected": asdict(guessing),
        "bars": settings.bars,
    }
    mean = _reference_mean(settings, context, objective, start.tokenizer)
    save_model(context, objective.model.decoder, start.tokenizer, report, objective.model.head, reward_mean=mean)
    return report | {"reward_mean": mean}


def _reference_mean(settings: Settings, context: StageContext, objective: Any, tokenizer: Any) -> float:
    """The mean score of demonstrations, 0 without any."""
    if "conversations" not in context.reads or not settings.references:
        return 0.0
    references = read_split(context.reads["conversations"], "val", Conversation, tokenizer)[: settings.references]
    return objective_file.reference_score(objective.model, tokenizer, references)
