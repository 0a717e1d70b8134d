"""Optimise the assistant against the reward model with any on-policy objective, and compare it with where it started.

`ppo` is this stage with PPO's settings spelled out; a new file in objectives/ runs through `objective: NAME` at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from pydantic import Field, model_validator

from nestling.core.config import parse
from nestling.core.pipeline import StageContext
from nestling.core.registry import find
from nestling.core.runtime import stream_seed
from nestling.core.storage import write_rows
from nestling.core.types import PromptRow
from nestling.evaluation.capabilities import converse
from nestling.evaluation.preferences import Scorer, by_score, mean_score, win_rate
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.loading.prompts import PromptLoader
from nestling.loading.shards import Shards
from nestling.loading.text import TextLoader
from nestling.model import checkpoint
from nestling.model.checkpoint import Checkpoint
from nestling.model.decoder import Decoder
from nestling.stages._training import TrainingStage, figures, materials, optimise, read_split, save_model
from nestling.stages._truth import WorldSettings, rubric_scorer
from nestling.tokenizer.conversation import render

VERSION = 1
READS = {"policy": "sft", "reward": "reward", "prompts": "prompts", "tokens?": "tokenize"}


class Comparison(TrainingStage):
    """How the policy is optimised and compared, whatever the objective."""

    text_rows: int = Field(8, ge=1, description="Rows of text per update when the pre-training loss is mixed in.")
    held_out: int = Field(128, ge=2, description="Held-out prompts of validation, which chooses the best policy.")
    test: int = Field(200, ge=2, description="Further held-out prompts, on which it is compared with its start.")
    test_temperature: float = Field(0.7, ge=0, description="Temperature of the comparison.")
    world: WorldSettings | None = Field(None, description="The world whose rubric gives the true reward; none: unknown.")


class Settings(Comparison):
    """An on-policy objective by name."""

    objective: str = Field("ppo", description="A file of objectives/.")
    settings: dict[str, Any] = Field({}, description="That objective's settings.")

    @model_validator(mode="after")
    def _settings_fit(self) -> Settings:
        parse(find("objectives", self.objective).Settings, self.settings, "settings")
        return self


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Find the objective and align with it."""
    module = find("objectives", settings.objective)
    return align(module, parse(module.Settings, settings.settings, "settings"), settings, context)


def align(module: ModuleType, chosen: Any, settings: Comparison, context: StageContext) -> dict[str, Any]:
    """Optimise, take the best policy within the KL budget, compare it with the policy it started from.

    Args:
        module: the file of objectives/, whose objective keeps `policy`, `restore_best()` and `proxy_scorer()`.
        chosen: that objective's settings, with `rollouts`, `max_tokens` and `text_weight`.
    """
    start = checkpoint.load(materials(context).path("policy"), context.runtime.device)
    train, held_out = (read_split(context.reads["prompts"], split, PromptRow) for split in ("train", "val"))
    size = start.model.config.context
    loader = PromptLoader(
        train, start.tokenizer, size, chosen.rollouts, context.seed, reserve=chosen.max_tokens, too_long="drop"
    )
    scorer = rubric_scorer(settings.world, context.seed) if settings.world else None
    fitting = [row for row in held_out if _fits(row, start, chosen.max_tokens)]
    given: dict[str, Any] = {"prompts": loader, "held_out": fitting[: settings.held_out], "scorer": scorer}
    if chosen.text_weight and "tokens" in context.reads:
        shards = Shards.open(context.reads["tokens"] / "train")
        given["texts"] = TextLoader(shards, size, settings.text_rows, stream_seed(context.seed, "ptx"))
    objective = module.build(chosen, materials(context, **given))
    result = optimise(objective, settings.training, context)
    best = objective.restore_best()
    test = fitting[settings.held_out : settings.held_out + settings.test]
    report = {**figures(result), **best, **_compare(settings, chosen, context, objective, test), "bars": settings.bars}
    save_model(context, objective.policy, start.tokenizer, report)
    return report


def _fits(row: PromptRow, start: Checkpoint, reserve: int) -> bool:
    ids = render(start.tokenizer, row.prompt, row.meta.get("tools", ()), prompt=True).ids
    return len(ids) + reserve <= start.model.config.context


def _compare(
    settings: Comparison, chosen: Any, context: StageContext, objective: Any, test: list[PromptRow]
) -> dict[str, Any]:
    """Win rate and rewards on prompts that neither training nor the choice of the best policy has seen."""
    if not test:
        return {}
    start = checkpoint.load(materials(context).path("policy"), context.runtime.device)
    sampling = Sampling(temperature=settings.test_temperature, max_tokens=chosen.max_tokens)
    seed = stream_seed(context.seed, "comparison")

    def answers(model: Decoder) -> list[str]:
        return [texts[-1] for texts in converse(test, Engine(model, start.tokenizer, rows=64), sampling, seed)]

    ours, theirs = answers(objective.policy), answers(start.model)
    proxy, truth = objective.proxy_scorer(), rubric_scorer(settings.world, context.seed) if settings.world else None
    found: dict[str, Any] = {
        "win_rate_vs_sft": win_rate(test, ours, theirs, by_score(truth or proxy)).to_row(),
        "judge": "rubric" if truth else "reward model",
    }
    for name, scorer in (("proxy_reward", proxy), ("true_reward", truth)):
        if scorer:
            found[name] = mean_score([scorer(row, text) for row, text in zip(test, ours, strict=True)]).to_row()
            found[f"{name}_sft"] = mean_score([scorer(r, t) for r, t in zip(test, theirs, strict=True)]).to_row()
    write_rows(context.folder / "comparison.jsonl", _rows(test, ours, theirs, truth or proxy))
    return found


def _rows(test: list[PromptRow], ours: list[str], theirs: list[str], judge: Scorer) -> Iterator[dict[str, Any]]:
    """Both answers to every test prompt, for whoever wants to read them."""
    for row, new, old in zip(test, ours, theirs, strict=True):
        prompt = [message.to_row() for message in row.prompt]
        yield {"prompt": prompt, "aligned": new, "start": old, "scores": [judge(row, new), judge(row, old)]}
