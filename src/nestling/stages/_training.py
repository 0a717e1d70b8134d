"""What all training stages share: run the loop on an objective, save the checkpoint with its provenance, sum up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from nestling.core import ranks
from nestling.core.config import Config
from nestling.core.metrics import MetricsLog
from nestling.core.pipeline import StageContext
from nestling.core.storage import read_json, read_rows
from nestling.core.types import Row
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.model import checkpoint
from nestling.model.decoder import Decoder
from nestling.model.heads import LabelHead, ScalarHead
from nestling.model.locate import MODEL
from nestling.objectives._materials import Materials
from nestling.tokenizer.bpe import Tokenizer
from nestling.training.contract import Objective
from nestling.training.hooks import Hook
from nestling.training.hooks import Sampling as SamplingHook
from nestling.training.loop import TrainResult, train
from nestling.training.settings import TrainSettings

Bars = dict[str, float | dict[str, float]]
"""Figures of a stage's report that are held to a limit: {val_bpb: {at_most: 1.2}, pairwise_accuracy: 0.85}."""


class TrainingStage(Config):
    """Settings that every training stage has."""

    training: TrainSettings
    """The loop."""
    bars: Bars = Field({}, description="Limits that the report holds figures to.")


def optimise(
    objective: Objective, settings: TrainSettings, context: StageContext, hooks: Sequence[Hook] = ()
) -> TrainResult:
    """Run the loop in the stage's folder."""
    return train(
        objective,
        settings,
        folder=context.folder,
        runtime=context.runtime,
        seed=context.seed,
        hooks=hooks,
        quiet=context.quiet,
    )


def materials(context: StageContext, **given: Any) -> Materials:
    """The stage's inputs as an objective takes them; checkpoints lie in `model/` of the folders of training stages."""
    paths = {role: path / MODEL if (path / MODEL).is_dir() else path for role, path in context.reads.items()}
    return Materials(context.runtime, context.seed, context.folder, paths, given=given)


def save_model(
    context: StageContext,
    model: Decoder,
    tokenizer: Tokenizer,
    metrics: Mapping[str, Any],
    head: ScalarHead | LabelHead | None = None,
    **extra: Any,
) -> None:
    """Write the stage's checkpoint, with where it comes from."""
    if not ranks.is_main():
        return
    parents = {role: _key(path) for role, path in context.reads.items()}
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    origin = {"stage": context.name, "seed": context.seed, "parents": parents, "metrics": numbers, **extra}
    checkpoint.save(context.folder / MODEL, model, tokenizer, origin, head)


def _key(path: Path) -> str:
    record = path / "stage.json"
    return read_json(record)["key"] if record.exists() else path.name


def figures(result: TrainResult) -> dict[str, Any]:
    """How the loop went, for the report."""
    last = result.history[-1] if result.history else {}
    report = {
        "steps": result.steps,
        "tokens": int(result.tokens),
        "training_seconds": round(result.seconds, 2),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "utilisation": round(result.utilisation, 4),
        "loss": last.get("loss"),
    }
    return report | ({"stopped": result.stopped} if result.stopped else {})


def read_split(folder: Path, split: str, kind: type[Row]) -> list[Any]:
    """All rows of one split of a data stage."""
    return list(read_rows(folder / f"{split}.jsonl", kind.from_row))


class SampleWriter:
    """Continuations of fixed prompts on the way, into samples.jsonl; a falling loss says less than a text."""

    def __init__(self, context: StageContext, model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
        self._path = context.folder / "samples.jsonl"
        self._engine = Engine(model, tokenizer, rows=max(1, len(prompts)))
        self._tokenizer, self._prompts = tokenizer, prompts

    def hook(self, every: int) -> SamplingHook:
        """The hook that writes every so many steps."""
        return SamplingHook(every, self.write)

    def write(self, step: int) -> None:
        """Append one row per prompt: {"step", "prompt", "text"}."""
        sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=80)
        start = self._tokenizer.end_of_text
        requests = [Request([start, *self._tokenizer.encode(text)], sampling, seed=n) for n, text in enumerate(self._prompts)]
        texts = [done.text for done in self._engine.generate(requests)]
        rows = [{"step": step, "prompt": p, "text": text} for p, text in zip(self._prompts, texts, strict=True)]
        append_rows(self._path, rows)


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append JSON lines; rows of steps at or beyond the first new one (of an attempt before a resume) are dropped."""
    if not rows:
        return
    log = MetricsLog(path, from_step=rows[0]["step"] - 1)
    for row in rows:
        log.write(row)
    log.close()
