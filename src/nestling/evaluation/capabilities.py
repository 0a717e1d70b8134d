"""What a model can do: every task's rows answered in one batched pass through the engine, checked, and summed up.

A task is a module of `tasks/` with `problems(world, seed, count) -> list[PromptRow]`, `check(row, replies) -> float` in
[0, 1] and `HIGHER_IS_BETTER`. A row may hold further user turns in `meta["turns"]` and tool names in `meta["tools"]`;
`check` receives the assistant's text of every turn.
Knows nothing of how the model was made, and scores nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.core.intervals import Interval, wilson
from nestling.core.registry import find
from nestling.core.types import Message, PromptRow
from nestling.generation.chat import prompt_ids, replies
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling

Check = Callable[[PromptRow, list[str]], float]


class TaskSettings(Config):
    """How one task is measured."""

    count: int = Field(default=100, ge=1)
    """Number of problems."""
    bar: float | None = None
    """The value to reach (at least, or at most where lower is better); None only reports."""
    seed: int = 0
    """Seed of the problems."""


@dataclass(frozen=True)
class Exam:
    """The rows of one task, ready to be asked.

    ``Exam("identity", rows, check=tasks.identity.check, bar=0.95)``
    """

    name: str
    rows: Sequence[PromptRow]
    check: Check
    bar: float | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class Sample:
    """One answered row: the messages as they went, the replies, and the share of the point it got."""

    prompt: list[dict[str, Any]]
    replies: list[str]
    score: float
    meta: dict[str, Any]


@dataclass(frozen=True)
class Capability:
    """A measured figure. Example: ``Capability(value=0.96, n=100, bar=0.95, interval=Interval(0.90, 0.98), ...)``.

    ``failures`` keeps the first rows that missed full marks (that got any, where lower is better).
    """

    value: float
    n: int
    bar: float | None
    interval: Interval
    higher_is_better: bool = True
    failures: list[Sample] = field(default_factory=list)

    @property
    def reached(self) -> bool | None:
        """Whether the value is on the right side of the bar; None without a bar."""
        if self.bar is None:
            return None
        return self.value >= self.bar if self.higher_is_better else self.value <= self.bar

    def to_row(self) -> dict[str, Any]:
        """The entry of report.json."""
        failures = [vars(sample) for sample in self.failures]
        return vars(self) | {"interval": list(self.interval), "reached": self.reached, "failures": failures}


def exam(name: str, world: Any, settings: TaskSettings) -> Exam:
    """The task called ``name`` over ``world``.

    Raises:
        UserError: no such task, or it has no problems to offer.
    """
    task: Any = find("tasks", name)
    rows = task.problems(world, settings.seed, settings.count)
    if not rows:
        raise UserError("the task offers no problems", where=f"tasks.{name}", value=settings.count)
    return Exam(name, rows, task.check, settings.bar, task.HIGHER_IS_BETTER)


def measure(
    exams: Sequence[Exam], engine: Engine, sampling: Sampling, *, seed: int = 0, failures: int = 5
) -> dict[str, Capability]:
    """Ask all rows of all exams together, turn by turn, and score them; at most ``failures`` failures kept of each."""
    rows = [row for exam in exams for row in exam.rows]
    answers = iter(zip(rows, converse(rows, engine, sampling, seed), strict=True))
    figures = {}
    for exam in exams:
        samples = [_score(exam.check, *next(answers)) for _ in exam.rows]
        figures[exam.name] = _sum_up(exam, samples, failures)
    return figures


def converse(rows: Sequence[PromptRow], engine: Engine, sampling: Sampling, seed: int = 0) -> list[list[str]]:
    """The assistant's text of every turn of every row; the n-th turns of all rows are answered in one batch.

    A conversation that has outgrown the context after its first reply ends there: it has fewer texts than turns.

    Raises:
        UserError: a row whose own prompt is longer than the context.
    """
    talks = [_Talk(row, list(row.meta.get("turns", ()))) for row in rows]
    turn = 0
    speaking = talks
    while speaking:
        answers = replies(engine, [talk.so_far for talk in speaking], sampling, seed + turn)
        for talk, reply in zip(speaking, answers, strict=True):
            talk.add(*reply.messages)
            talk.texts.append(reply.text)
        speaking = [talk for talk in speaking if talk.go_on() and talk.fits(engine)]
        turn += 1
    return [talk.texts for talk in talks]


@dataclass
class _Talk:
    """A conversation under way: the row with all that was said so far, and what the user will still say."""

    so_far: PromptRow
    waiting: list[str]
    texts: list[str] = field(default_factory=list)

    def add(self, *messages: Message) -> None:
        """Append what was just said."""
        self.so_far = self.so_far.model_copy(update={"prompt": (*self.so_far.prompt, *messages)})

    def go_on(self) -> bool:
        """Let the user speak again; False when nothing is left to say."""
        if not self.waiting:
            return False
        self.add(Message(role="user", content=self.waiting.pop(0)))
        return True

    def fits(self, engine: Engine) -> bool:
        """Whether the context has room for an answer."""
        row = self.so_far
        return len(prompt_ids(engine.tokenizer, row.prompt, row.tools)) < engine.capacity


def _score(check: Check, row: PromptRow, texts: list[str]) -> Sample:
    prompt = [message.to_row() for message in row.prompt]
    return Sample(prompt, texts, float(check(row, texts)), dict(row.meta))


def _sum_up(exam: Exam, samples: list[Sample], failures: int) -> Capability:
    total = sum(sample.score for sample in samples)
    wrong = [s for s in samples if (s.score < 1.0 if exam.higher_is_better else s.score > 0.0)]
    return Capability(
        value=total / len(samples),
        n=len(samples),
        bar=exam.bar,
        interval=wilson(total, len(samples)),
        higher_is_better=exam.higher_is_better,
        failures=wrong[:failures],
    )
