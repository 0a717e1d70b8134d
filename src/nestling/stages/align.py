"""Optimise the assistant against the reward model with any on-policy objective, and compare it with where it started.

`ppo` is this stage with PPO's settings spelled out; a new file in objectives/ runs through `objective: NAME` at once.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

from pydantic import Field, model_validator

from nestling.core import ranks
from nestling.core.config import parse
from nestling.core.pipeline import StageContext
from nestling.core.registry import find
from nestling.core.runtime import stream_seed
from nestling.core.storage import write_rows
from nestling.core.types import PromptRow, Scorer
from nestling.evaluation.capabilities import converse
from nestling.evaluation.preferences import mean_score, win_rate_by_scores
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.loading.prompts import PromptLoader
from nestling.loading.shards import Shards
from nestling.loading.text import TextLoader
from nestling.model import checkpoint
from nestling.model.checkpoint import Checkpoint
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder
from nestling.objectives._on_policy import OnPolicy, PolicySettings
from nestling.planning.work import Known, Work
from nestling.stages._preflight import model_in
from nestling.stages._training import Adaptable, figures, materials, optimise, read_split, save_model, starting_model
from nestling.stages._truth import WorldSettings, rubric_scorer
from nestling.tokenizer.conversation import render

VERSION = 1
READS = {"policy": "sft", "reward": "reward", "prompts": "prompts", "tokens?": "tokenize"}


class Comparison(Adaptable):
    """How the policy is optimised and compared, whatever the objective."""

    text_rows: int = Field(8, ge=1, description="Rows of text per update when the pre-training loss is mixed in.")
    held_out: int = Field(128, ge=2, description="Held-out prompts of validation, which chooses the best policy.")
    test: int = Field(200, ge=2, description="Further held-out prompts, on which it is compared with its start.")
    test_temperature: float = Field(0.7, ge=0, description="Temperature of the comparison.")
    world: WorldSettings | None = Field(None, description="The world whose rubric gives the true reward; none: unknown.")
    regular: ClassVar[bool] = OnPolicy.fixed_shapes


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


def work(settings: Settings, known: Known) -> Work | None:
    """What a step reads, before the prompts are known: prompts and replies as long as the context."""
    chosen = parse(find("objectives", settings.objective).Settings, settings.settings, "settings")
    return replies_work(chosen, settings, known, "settings.microbatches")


def replies_work(
    chosen: PolicySettings, settings: Comparison, known: Known, pieces: str = "objective.microbatches"
) -> Work | None:
    """A step of any on-policy objective: the policy writes, all models read, the policy (and a value model) learn."""
    policy, reward = known.get("policy"), known.get("reward")
    if not isinstance(policy, DecoderConfig) or not isinstance(reward, DecoderConfig):
        return None
    learnt = (policy, reward) if "value_weight" in type(chosen).model_fields else (policy,)
    frozen: tuple[DecoderConfig, ...] = (policy, reward)
    if settings.adapters:  # these share what is frozen; a reward model that no value model grew from stands alone
        frozen = () if len(learnt) > 1 else (reward,)
    return Work(
        learnt,
        settings.training.steps,
        chosen.rollouts,
        policy.context,
        minibatches=chosen.minibatches,
        microbatches=chosen.microbatches,
        epochs=chosen.epochs,
        readers=(policy, policy, reward, *learnt),
        frozen=frozen,
        written=chosen.rollouts,
        exact=False,
        pieces_setting=pieces,
        adapters=settings.adapters,
    )


def align(module: ModuleType, chosen: PolicySettings, settings: Comparison, context: StageContext) -> dict[str, Any]:
    """Optimise, take the best policy within the KL budget, compare it with the policy it started from.

    Args:
        module: a file of objectives/ whose objective is an `OnPolicy`.
        chosen: that objective's settings.
    """
    start = starting_model(settings, context, "policy")
    train, held_out = (
        read_split(context.reads["prompts"], split, PromptRow, start.tokenizer) for split in ("train", "val")
    )
    size = start.model.config.context
    loader = PromptLoader(
        train, start.tokenizer, size, chosen.prompts, context.seed, reserve=chosen.max_tokens, too_long="drop"
    )
    scorer = rubric_scorer(settings.world, context.seed) if settings.world else None
    fitting = [row for row in held_out if fits(row, start, chosen.max_tokens)]
    given: dict[str, Any] = {"prompts": loader, "held_out": fitting[: settings.held_out], "scorer": scorer}
    if chosen.text_weight and "tokens" in context.reads:
        shards = Shards.open(context.reads["tokens"] / "train")
        given["texts"] = TextLoader(shards, size, settings.text_rows, stream_seed(context.seed, "ptx"))
    stuff = materials(context, **given)
    if settings.adapters is not None:  # the models that learn share the frozen weights with those that don't
        stuff = replace(stuff, models={"policy": start, "reward": starting_model(settings, context, "reward")})
    objective: OnPolicy = module.build(chosen, stuff)
    known = {"policy": start.model.config, "reward": model_in(context.reads["reward"])}
    reading = replies_work(chosen, settings, {role: found for role, found in known.items() if found})
    longest = max(len(prompt.ids) for prompts in loader.validation() for prompt in prompts)
    exact = reading and replace(reading, width=min(size, longest + chosen.max_tokens), exact=True)
    result = optimise(objective, settings.training, context, work=exact)
    best = objective.restore_best()
    test = fitting[settings.held_out : settings.held_out + settings.test]
    compared = _compare(settings, context, objective, test, scorer)
    report = {**figures(result), **best, **compared, "dropped": loader.dropped, "bars": settings.bars}
    save_model(context, objective.policy, start.tokenizer, report)
    return report


def fits(row: PromptRow, start: Checkpoint, reserve: int) -> bool:
    """Whether the context holds the prompt and a reply of `reserve` tokens."""
    ids = render(start.tokenizer, row.prompt, row.tools, prompt=True).ids
    return len(ids) + reserve <= start.model.config.context


def _compare(
    settings: Comparison, context: StageContext, objective: OnPolicy, test: list[PromptRow], truth: Scorer | None
) -> dict[str, Any]:
    """Win rate and rewards on prompts that neither training nor the choice of the best policy has seen."""
    if not test:
        return {}
    start = checkpoint.load(materials(context).path("policy"), context.runtime.device)
    sampling = Sampling(temperature=settings.test_temperature, max_tokens=objective.settings.max_tokens)
    seed = stream_seed(context.seed, "comparison")

    def answers(model: Decoder) -> list[str]:
        engine = Engine(model, start.tokenizer, rows=64, frozen=True)
        texts: list[str] = ranks.from_main([texts[-1] for texts in converse(test, engine, sampling, seed)])
        return texts

    def judged(texts: list[str]) -> dict[str, list[float]]:
        scores = {"proxy_reward": objective.proxy_scores(test, texts)}
        return scores | ({"true_reward": list(map(truth, test, texts))} if truth else {})

    ours, theirs = answers(objective.policy), answers(start.model)
    new, old = judged(ours), judged(theirs)
    judge = "true_reward" if truth else "proxy_reward"
    found: dict[str, Any] = {
        "win_rate_vs_sft": win_rate_by_scores(new[judge], old[judge]).to_row(),
        "judge": "rubric" if truth else "reward model",
    }
    for name in new:
        found |= {name: mean_score(new[name]).to_row(), f"{name}_sft": mean_score(old[name]).to_row()}
    rows = zip(test, ours, theirs, new[judge], old[judge], strict=True)
    if ranks.is_main():
        write_rows(context.folder / "comparison.jsonl", map(_row, rows))
    return found


def _row(compared: tuple[PromptRow, str, str, float, float]) -> dict[str, Any]:
    """Both answers to a test prompt and their scores, for whoever wants to read them."""
    row, new, old, *scores = compared
    prompt = [message.to_row() for message in row.prompt]
    return {"prompt": prompt, "aligned": new, "start": old, "scores": scores}
