"""Reads a run folder: what each stage recorded, logged and sampled. Judges nothing and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestling.core.errors import UserError
from nestling.core.metrics import read_metrics
from nestling.core.storage import read_json

POLICY_STAGES = ("align", "ppo")
"""Files of `stages/` in which a policy learns from rewards."""
Row = dict[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run.

    >>> StageRecord("sft", "sft", report={"loss": 0.4}, rows=[{"step": 1, "loss": 2.0}]).series("loss")
    [(1.0, 2.0)]

    `name` is the stage's name in the recipe and `kind` the file of `stages/` that ran; `finished` is None for a stage
    that was begun and not completed. `rows` is its metrics.jsonl, where a number that was not finite is None; `samples`
    and `failures` are the files of that name: texts on the way, and answers that cost points.
    """

    name: str
    kind: str
    key: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    finished: str | None = None
    rows: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    failures: list[Row] = field(default_factory=list)

    @property
    def trains_policy(self) -> bool:
        """Whether a policy learnt from rewards here: its loss has no floor to fall to, its curves are others."""
        return self.kind in POLICY_STAGES

    def series(self, name: str) -> Points:
        """(step, value) of one logged number, without the rows that lack it or where it was not finite."""
        pairs = ((number(row.get("step")), number(row.get(name))) for row in self.rows)
        return [(step, value) for step, value in pairs if step is not None and value is not None]

    def first_series(self, *names: str) -> Points:
        """The series of the first of `names` that was logged at all, or nothing."""
        return next((points for name in names if (points := self.series(name))), [])

    def figure(self, name: str) -> float | None:
        """A number of the stage's final report; `{"value": x, …}` counts as x."""
        return number(self.report.get(name))

    def setting(self, name: str) -> float | None:
        """A number of the stage's settings, wherever it is nested."""
        return _nested(self.settings, name)


@dataclass(frozen=True)
class Run:
    """A run folder: `Run(name="demo", description="…", seed=1, stages=[…])`, stages in the recipe's order."""

    name: str
    stages: list[StageRecord]
    description: str = ""
    seed: int | None = None

    def of_kind(self, kind: str) -> list[StageRecord]:
        """The stages that one file of `stages/` ran, in order."""
        return [stage for stage in self.stages if stage.kind == kind]

    @property
    def seconds(self) -> float:
        """Work of all finished stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def finished(self) -> str | None:
        """When the last stage was completed (ISO 8601), None if none was."""
        return max((stage.finished for stage in self.stages if stage.finished), default=None)

    @property
    def synthetic(self) -> bool:
        """Whether any stage drew from the embedded world."""
        return any(_names_world(stage.settings) or stage.report.get("synthetic") for stage in self.stages)


def _nested(settings: Mapping[str, Any], name: str) -> float | None:
    """The first number called `name` in nested settings, the outermost first."""
    if (found := number(settings.get(name))) is not None:
        return found
    inner = (_nested(value, name) for value in settings.values() if isinstance(value, Mapping))
    return next((value for value in inner if value is not None), None)


def number(value: object) -> float | None:
    """A finite number as a float, also out of `{"value": x}`; None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("value")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def read_run(folder: Path) -> Run:
    """The stages of a run folder.

    Raises:
        UserError: there is no such folder, or no stage has begun in it.
    """
    recipe = read_json(folder / "recipe.json") if (folder / "recipe.json").exists() else {}
    if not isinstance(recipe, dict):
        raise UserError("not a recipe", where=folder / "recipe.json")
    begun = (path for path in folder.glob("*/") if not path.name.startswith(".")) if folder.is_dir() else ()
    stages = [stage for path in begun if (stage := _read_stage(path)) is not None]
    if not stages:
        raise UserError("no stage of a run is here", where=folder, fix="give the folder that `nestling run` wrote")
    order = [spec.get("name") for spec in recipe.get("stages", ())]
    stages.sort(key=lambda s: (order.index(s.name) if s.name in order else len(order), s.finished or "~", s.name))
    name = str(recipe.get("name") or folder.resolve().name)
    return Run(name, stages, description=str(recipe.get("description", "")), seed=recipe.get("seed"))


def _read_stage(folder: Path) -> StageRecord | None:
    """The record of one stage folder; None for a folder in which no stage has begun."""
    files = (folder / f"{name}.jsonl" for name in ("metrics", "samples", "failures"))
    rows, samples, failures = (read_metrics(file) if file.exists() else [] for file in files)
    if not (folder / "stage.json").exists():
        begun = rows or (folder / "started.json").exists()
        return StageRecord(folder.name, folder.name, rows=rows, samples=samples) if begun else None
    record = read_json(folder / "stage.json")
    return StageRecord(
        name=record.get("name", folder.name), kind=record.get("stage", folder.name), key=record.get("key", ""),
        settings=record.get("settings") or {}, report=record.get("report") or {}, reads=record.get("reads") or {},
        seconds=number(record.get("seconds")) or 0.0, finished=record.get("finished") or "",
        rows=rows, samples=samples, failures=failures,
    )  # fmt: skip


def _names_world(value: object) -> bool:
    """Whether settings name the world as a source: the word itself, or a setting called so that is on."""
    if isinstance(value, Mapping):
        return any((key == "world" and bool(inner)) or _names_world(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return any(_names_world(inner) for inner in value)
    return value == "world"
