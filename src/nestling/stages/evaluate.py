"""Measure what the models can do: every task beside its bar, and the same prompts answered by each stage's model."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.core.pipeline import StageContext
from nestling.core.registry import find
from nestling.core.storage import write_rows
from nestling.core.types import Message, PromptRow
from nestling.evaluation.capabilities import TaskSettings, converse, exam, measure
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.model import checkpoint
from nestling.model.checkpoint import Checkpoint
from nestling.model.locate import checkpoint_folder
from nestling.stages._truth import WorldSettings

VERSION = 1
READS = {"base?": "pretrain", "sft?": "sft", "ppo?": "ppo", "aligned?": "align"}


class Settings(Config):
    """What is measured, and how."""

    tasks: dict[str, TaskSettings] = Field({}, description="Files of tasks/, each with its count and bar.")
    world: WorldSettings | None = Field(None, description="The world whose facts the tasks ask for.")
    max_tokens: int = Field(96, ge=1, description="Longest reply.")
    rows: int = Field(64, ge=1, description="Replies decoded together.")
    prompts: tuple[str, ...] = Field((), description="Prompts answered by every model, for the report.")

    @model_validator(mode="after")
    def _tasks_exist(self) -> Settings:
        for name in self.tasks:
            find("tasks", name, "tasks")
        if self.tasks and self.world is None:
            raise UserError("the tasks ask for facts of a world, and none is given", where="world", fix="set world: {}")
        return self


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Capabilities of every chat model there is; those of the last one are the run's."""
    models = {role: checkpoint.load(checkpoint_folder(path), context.runtime.device) for role, path in context.reads.items()}
    report: dict[str, Any] = {"answers": _answers(settings, models), "synthetic": settings.world is not None}
    if settings.tasks and settings.world:
        world = settings.world.world(context.seed)
        exams = [exam(name, world, task) for name, task in settings.tasks.items()]
        by_model: dict[str, Any] = {}
        for role, found in models.items():
            if _chats(found):
                engine = Engine(found.model, found.tokenizer, rows=settings.rows, frozen=True)
                measured = measure(exams, engine, _sampling(settings), seed=context.seed)
                by_model[role] = {name: capability.to_row() for name, capability in measured.items()}
        report |= {"capabilities": list(by_model.values())[-1], "by_model": _values(by_model)} if by_model else {}
        failures = [
            {"model": role, "task": name, **failure}
            for role, rows in by_model.items()
            for name, row in rows.items()
            for failure in row.pop("failures")
        ]
        write_rows(context.folder / "failures.jsonl", failures)
    return report


def _sampling(settings: Settings) -> Sampling:
    return Sampling(temperature=0.0, max_tokens=settings.max_tokens)


def _values(by_model: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {role: {name: row["value"] for name, row in rows.items()} for role, rows in by_model.items()}


def _chats(found: Checkpoint) -> bool:
    return found.tokenizer.chat_template is not None


def _answers(settings: Settings, models: dict[str, Checkpoint]) -> list[dict[str, str]]:
    """The report's before and after: {"prompt", and each model's text under its role}."""
    answers: list[dict[str, str]] = [{"prompt": prompt, "kind": "chat"} for prompt in settings.prompts]
    for role, found in models.items():
        engine = Engine(found.model, found.tokenizer, rows=settings.rows, frozen=True)
        for answer, text in zip(answers, _texts(settings, found, engine), strict=True):
            answer[role] = text
    return answers


def _texts(settings: Settings, found: Checkpoint, engine: Engine) -> list[str]:
    """Greedy answers to the prompts; a base model, which knows no turns, continues them as text."""
    sampling = _sampling(settings)
    if _chats(found):
        tools = {"tools": ["calculator"]}
        rows = [PromptRow(prompt=(Message(role="user", content=text),), meta=tools) for text in settings.prompts]
        return [texts[-1] for texts in converse(rows, engine, sampling)]
    start = found.tokenizer.start_of_text
    requests = [
        Request([start, *found.tokenizer.encode(text)], sampling.model_copy(update={"max_tokens": 40}), seed=0)
        for text in settings.prompts
    ]
    return [done.text for done in engine.generate(requests)]
