"""Optimise the assistant against the reward model (PPO), and compare it with where it started on held-out prompts."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from nestling.core.pipeline import StageContext
from nestling.core.runtime import stream_seed
from nestling.core.types import PromptRow
from nestling.evaluation.capabilities import converse
from nestling.evaluation.preferences import by_score, mean_score, win_rate
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.loading.prompts import PromptLoader
from nestling.loading.shards import Shards
from nestling.loading.text import TextLoader
from nestling.model import checkpoint
from nestling.objectives import ppo
from nestling.stages._training import TrainingStage, figures, materials, optimise, read_split, save_model
from nestling.stages._truth import WorldSettings, rubric_scorer
from nestling.tokenizer.bpe import Tokenizer

VERSION = 1
READS = {"policy": "sft", "reward": "reward", "prompts": "prompts", "tokens?": "tokenize"}


class Settings(TrainingStage):
    """How the policy is optimised and compared."""

    objective: ppo.Settings = ppo.Settings()
    text_rows: int = Field(8, ge=1, description="Rows of text per update when the pre-training loss is mixed in.")
    held_out: int = Field(128, ge=2, description="Held-out prompts of validation, which chooses the best policy.")
    test: int = Field(200, ge=2, description="Further held-out prompts, on which it is compared with its start.")
    test_temperature: float = Field(0.7, ge=0, description="Temperature of the comparison.")
    world: WorldSettings | None = Field(None, description="The world whose rubric gives the true reward; none: unknown.")


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Optimise, take the best policy within the KL budget, compare it with the policy it started from."""
    start = checkpoint.load(materials(context).path("policy"), context.runtime.device)
    rows = read_split(context.reads["prompts"], "train", PromptRow)
    held_out = read_split(context.reads["prompts"], "val", PromptRow)
    size, reserve = start.model.config.context, settings.objective.max_tokens
    count = settings.objective.rollouts
    prompts = PromptLoader(rows, start.tokenizer, size, count, context.seed, reserve=reserve, drop_too_long=True)
    scorer = rubric_scorer(settings.world, context.seed) if settings.world else None
    given: dict[str, Any] = {"prompts": prompts, "held_out": held_out[: settings.held_out], "scorer": scorer}
    if settings.objective.text_weight and "tokens" in context.reads:
        shards = Shards.open(context.reads["tokens"] / "train")
        given["texts"] = TextLoader(shards, size, settings.text_rows, stream_seed(context.seed, "ptx"))
    objective = ppo.build(settings.objective, materials(context, **given))
    result = optimise(objective, settings.training, context)
    best = objective.restore_best()
    test = held_out[settings.held_out : settings.held_out + settings.test]
    report = {**figures(result), **best, **_compare(settings, context, objective, test), "bars": settings.bars}
    save_model(context, objective.cast.policy, start.tokenizer, report)
    return report


def _compare(settings: Settings, context: StageContext, objective: ppo.PPO, test: list[PromptRow]) -> dict[str, Any]:
    """Win rate and rewards on prompts that neither training nor the choice of the best policy has seen."""
    if not test:
        return {}
    tokenizer = objective.cast.tokenizer
    start = checkpoint.load(materials(context).path("policy"), context.runtime.device).model
    ours, theirs = (_answers(settings, model, tokenizer, test, context.seed) for model in (objective.cast.policy, start))
    proxy = objective.proxy_scorer()
    judge = objective.cast.scorer or proxy
    found: dict[str, Any] = {
        "win_rate_vs_sft": win_rate(test, ours, theirs, by_score(judge)).to_row(),
        "judge": "rubric" if objective.cast.scorer else "reward model",
    }
    for name, scorer in (("proxy_reward", proxy), ("true_reward", objective.cast.scorer)):
        if scorer:
            found[name] = mean_score([scorer(row, text) for row, text in zip(test, ours, strict=True)]).to_row()
            found[f"{name}_sft"] = mean_score([scorer(r, t) for r, t in zip(test, theirs, strict=True)]).to_row()
    return found


def _answers(settings: Settings, model: Any, tokenizer: Tokenizer, rows: list[PromptRow], seed: int) -> list[str]:
    """One reply to every row."""
    sampling = Sampling(temperature=settings.test_temperature, max_tokens=settings.objective.max_tokens)
    engine = Engine(model, tokenizer, rows=64)
    return [texts[-1] for texts in converse(rows, engine, sampling, stream_seed(seed, "comparison"))]
