"""Ask every candidate the same prompts, and note how good each answer was and what it cost: what a router learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from nestling.core.config import Config, nearest
from nestling.core.errors import UserError
from nestling.core.metrics import Progress
from nestling.core.pipeline import StageContext
from nestling.core.storage import write_json, write_rows
from nestling.core.types import PromptRow
from nestling.evaluation.routing import Candidate, Outcome, Trial
from nestling.generation.chat import prompt_ids, replies
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.model import checkpoint
from nestling.model.checkpoint import Checkpoint
from nestling.model.locate import checkpoint_folder
from nestling.serving.answering import EFFORTS, ThoughtLimit, forbidden
from nestling.serving.choosing import THINKING
from nestling.stages._training import read_split
from nestling.stages._truth import WorldSettings, correctness
from nestling.tokenizer.conversation import opened_by, parse_reply, render
from nestling.tokenizer.special import THINK_START

VERSION = 3
READS = {"prompts": "prompts", "small": "sft", "medium?": "medium", "large?": "large"}
CANDIDATES = "candidates.json"


class Settings(Config):
    """Who answers, and who judges."""

    candidates: dict[str, Candidate] = Field(
        {"direct": Candidate(model="small"), "with tools": Candidate(model="small", effort="tools")},
        min_length=2, description="Ways of answering, by name; `model` is an input: small, medium or large.",
    )  # fmt: skip
    world: WorldSettings = WorldSettings()
    """The world that knows what is right."""
    tools: tuple[str, ...] = Field(("calculator",), description="What effort tools puts on offer.")
    max_tokens: int = Field(96, ge=1, description="Longest answer, a thought included.")
    rows: int = Field(64, ge=1, description="Answers decoded together.")

    @model_validator(mode="after")
    def _models_are_inputs(self) -> Settings:
        roles = [role.rstrip("?") for role in READS if role != "prompts"]
        for name, candidate in self.candidates.items():
            if candidate.model not in roles:
                where = f"candidates.{name}.model"
                raise UserError("not an input", where=where, value=candidate.model, fix=nearest(candidate.model, roles))
        return self


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Write train.jsonl and val.jsonl, a row per prompt; report each candidate's accuracy and cost."""
    needed = {candidate.model for candidate in settings.candidates.values()}
    if missing := sorted(needed - set(context.reads)):
        raise UserError("a candidate's model is no input of this stage", where=f"{context.name}.reads", value=missing[0])
    models = {role: checkpoint.load(checkpoint_folder(context.reads[role]), context.runtime.device) for role in needed}
    given = {split: read_split(context.reads["prompts"], split, PromptRow) for split in ("train", "val")}
    prompts = {split: [row for row in rows if _fits(settings, models, row)] for split, rows in given.items()}
    asked = [*prompts["train"], *prompts["val"]]
    found: dict[str, list[Outcome]] = {}
    with Progress(context.name, len(settings.candidates), "candidates", context.quiet) as progress:
        for name, candidate in settings.candidates.items():
            found[name] = _outcomes(settings, context, models[candidate.model], candidate, asked)
            progress.advance(candidate=name)
    rows = [
        Trial(prompt=row.prompt, outcomes={name: found[name][n] for name in found}, meta={"kind": row.meta.get("kind")})
        for n, row in enumerate(asked)
    ]
    cut = len(prompts["train"])
    write_rows(context.folder / "train.jsonl", (row.to_row() for row in rows[:cut]))
    write_rows(context.folder / "val.jsonl", (row.to_row() for row in rows[cut:]))
    write_json(context.folder / CANDIDATES, {name: c.model_dump() for name, c in settings.candidates.items()})
    means = {
        name: {
            "accuracy": sum(outcome.score for outcome in outcomes) / len(outcomes),
            "cost": sum(outcome.cost for outcome in outcomes) / len(outcomes),
            "parameters": models[settings.candidates[name].model].model.parameter_count(),
        }
        for name, outcomes in found.items()
    }
    dropped = sum(map(len, given.values())) - len(asked)
    return {"prompts": len(asked), "dropped": dropped, "candidates": means, "synthetic": True}


def _fits(settings: Settings, models: Mapping[str, Checkpoint], row: PromptRow) -> bool:
    """Whether every model has room for the prompt, tools and a thought included, and for an answer."""
    longest = max(len(render(model.tokenizer, row.prompt, settings.tools, prompt=True).ids) for model in models.values())
    return longest + 1 < min(model.model.config.context for model in models.values())


def _outcomes(
    settings: Settings, context: StageContext, found: Checkpoint, candidate: Candidate, asked: Sequence[PromptRow]
) -> list[Outcome]:
    """Score and cost of one candidate's answer to every prompt; it may think and call tools where the service lets it."""
    engine = Engine(found.model, found.tokenizer, rows=settings.rows, frozen=True)
    tools, thinks = settings.tools if candidate.effort == "tools" else (), candidate.effort == "thinking"
    begun = render(found.tokenizer, asked[0].prompt, prompt=True).ids if asked else []  # as the template begins every reply
    bias = forbidden(found.tokenizer, begun, calls=bool(tools), thoughts=thinks)
    sampling = Sampling(temperature=0.0, max_tokens=settings.max_tokens, logit_bias=bias)
    offered = [row.model_copy(update={"meta": {**row.meta, "tools": tools}}) for row in asked]
    answer = _thoughtful if thinks else _spoken
    score = correctness(settings.world, context.seed)
    size = found.model.parameter_count()
    answers = answer(engine, offered, sampling, context.seed)
    return [
        Outcome(score=score(row, text), cost=float(size * tokens))
        for row, (text, tokens) in zip(asked, answers, strict=True)
    ]


def _spoken(engine: Engine, rows: Sequence[PromptRow], sampling: Sampling, seed: int) -> list[tuple[str, int]]:
    """(answer, tokens that went through the model) of each prompt; tool calls are run on the way."""
    lengths = [len(prompt_ids(engine.tokenizer, row.prompt, row.tools)) for row in rows]
    answers = replies(engine, rows, sampling, seed)
    return [(reply.text, n + len(reply.completion.ids)) for n, reply in zip(lengths, answers, strict=True)]


def _thoughtful(engine: Engine, rows: Sequence[PromptRow], sampling: Sampling, seed: int) -> list[tuple[str, int]]:
    """As `_spoken`, with a thought opened for the model and bounded; it costs, and is no part of the answer."""
    tokenizer, opened = engine.tokenizer, engine.tokenizer.id(THINK_START)
    budget = int(sampling.max_tokens * EFFORTS[THINKING])
    rendered = [render(tokenizer, row.prompt, prompt=True).ids for row in rows]
    starts = [ids if opened_by(tokenizer, ids) == THINK_START else [*ids, opened] for ids in rendered]
    limits = [ThoughtLimit(tokenizer, budget, THINK_START) for _ in rows]
    asked = zip(starts, limits, strict=True)
    done = engine.generate([Request(ids, sampling, seed=seed + n, interject=i) for n, (ids, i) in enumerate(asked)])
    texts = [parse_reply(tokenizer, [opened, *completion.ids]).content for completion in done]
    return [(text, len(ids) + len(c.ids)) for text, ids, c in zip(texts, starts, done, strict=True)]
