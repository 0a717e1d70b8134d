"""What all training stages share: run the loop on an objective, save the checkpoint with its provenance, sum up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from nestling.core import ranks
from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.core.metrics import MetricsLog
from nestling.core.pipeline import StageContext
from nestling.core.runtime import Runtime, torch_stream
from nestling.core.storage import read_json, read_rows
from nestling.core.types import Row
from nestling.generation.chat import offered
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.model import adapters, checkpoint
from nestling.model.adapters import Adaptation, AdapterSettings
from nestling.model.checkpoint import Checkpoint
from nestling.model.decoder import Decoder
from nestling.model.heads import LabelHead, ScalarHead
from nestling.model.locate import MODEL
from nestling.objectives._materials import Materials
from nestling.planning.work import Work
from nestling.stages._preflight import MemoryWatch, memory_figures
from nestling.tokenizer.bpe import Tokenizer
from nestling.training.contract import Objective
from nestling.training.float8 import checked
from nestling.training.health import Expected, Watching
from nestling.training.hooks import Hook
from nestling.training.hooks import Sampling as SamplingHook
from nestling.training.loop import TrainResult, train
from nestling.training.precision import training_dtype
from nestling.training.settings import TrainSettings

Bars = dict[str, float | dict[str, float]]
"""Figures of a stage's report that are held to a limit: {val_bpb: {at_most: 1.2}, pairwise_accuracy: 0.85}."""


class TrainingStage(Config):
    """Settings that every training stage has."""

    training: TrainSettings
    """The loop."""
    bars: Bars = Field({}, description="Limits that the report holds figures to.")

    regular: ClassVar[bool] = True
    """Whether the objective calls its models equally often on every process, as those must that hold pieces of one."""

    def check(self, runtime: Runtime) -> None:
        """Before any stage runs: precision and layout have to be such that this machine and these processes can train so."""
        if self.training.precision == "fp8":
            checked(runtime.device, self.training.parallel)
        if ranks.is_distributed():
            from nestling.training.parallel import layout_sizes  # seconds to import, of no use to a single process

            layout_sizes(self.training.parallel, self.regular, training_dtype(self.training.precision, runtime))


class Adaptable(TrainingStage):
    """Settings of a training stage that can learn adapters instead of all weights."""

    # Left out of the stage's key where there are none: what was trained before there were adapters stays finished.
    adapters: AdapterSettings | None = Field(
        None,
        exclude_if=lambda chosen: chosen is None,
        description="Low-rank adapters (LoRA) to learn; the model itself stays as it is. None trains all weights.",
    )


def starting_model(
    settings: Adaptable, context: StageContext, role: str, extended: Callable[[Checkpoint], Checkpoint] | None = None
) -> Checkpoint:
    """The checkpoint of an input, ready to be trained: all of it, or adapters on it where the settings ask for them.

    Args:
        extended: gives the model further tokens. With adapters the rows of these learn too; where the model has to grow
            for them, the grown one is written to `base/` in the stage's folder, for the adapter to name.

    Raises:
        UserError: the input has adapters of other settings.
    """
    folder, device = materials(context).path(role), context.runtime.device
    extend = extended or (lambda found: found)
    if settings.adapters is None:
        return extend(checkpoint.load(folder, device))
    sharded = ranks.is_distributed()  # FSDP2 wants one dtype
    dtype = torch.float32 if sharded else _frozen_dtype(settings.training, context)
    start = checkpoint.load(folder, device, dtype, merge=False)
    size, known = start.model.config.vocab_size, set(start.tokenizer.special.values())
    if (earlier := adapters.adaptation(start.model)) is not None:
        return _continued(start, earlier, settings.adapters, extend(start), folder)
    start = extend(start)
    tokens = sorted(set(start.tokenizer.special.values()) - known)
    if start.model.config.vocab_size > size:
        folder = _written(context, start)
    origin = Adaptation(settings.adapters, folder)
    adapters.adapt(start.model, origin, torch_stream(context.seed, "adapters", role), tokens)
    return start


def _frozen_dtype(training: TrainSettings, context: StageContext) -> torch.dtype:
    chosen = training_dtype(training.precision, context.runtime)
    return torch.bfloat16 if chosen == torch.bfloat16 else torch.float32


def _written(context: StageContext, grown: Checkpoint) -> Path:
    folder = context.folder / "base"
    if ranks.is_main():
        checkpoint.save(folder, grown.model, grown.tokenizer, grown.provenance, grown.head)
    ranks.barrier()
    return folder


def _continued(
    start: Checkpoint, earlier: Adaptation, wanted: AdapterSettings, extended: Checkpoint, folder: Path
) -> Checkpoint:
    """A model with adapters whose adapters are trained further."""
    same = earlier.settings.model_copy(update={"dropout": wanted.dropout, "targets": wanted.targets}) == wanted
    paths = {path.rsplit(".", 1)[-1] for path in adapters.adapted_layers(start.model)}
    chosen = set(wanted.targets) or paths
    if not same or chosen != paths or extended.tokenizer.hash != start.tokenizer.hash:
        fix = "use the same settings, or begin from its merged model (nestling merge)"
        raise UserError("this model has other adapters already", where=folder, value=earlier.settings.model_dump(), fix=fix)
    adapters.resume(start.model, wanted)
    return start


def optimise(
    objective: Objective,
    settings: TrainSettings,
    context: StageContext,
    hooks: Sequence[Hook] = (),
    expected: Expected | None = None,
    work: Work | None = None,
) -> TrainResult:
    """Run the loop in the stage's folder, and watch it.

    Args:
        expected: what its loss is compared with; None where the loss itself says nothing.
        work: what a step reads; with it, what will not fit into memory is refused before the first step.

    Raises:
        UserError: too little memory is free.
    """
    memory = [MemoryWatch(work, objective, settings, context.runtime, context.name)] if work else []
    watching = Watching(expected or Expected(), context.quiet, policy=expected is None)
    return train(
        objective,
        settings,
        folder=context.folder,
        runtime=context.runtime,
        seed=context.seed,
        hooks=[watching, *memory, *hooks],
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
        **memory_figures(last),
    }
    return report | ({"stopped": result.stopped} if result.stopped else {})


def read_split(folder: Path, split: str, kind: type[Row], tokenizer: Tokenizer | None = None) -> list[Any]:
    """All rows of one split of a data stage; with `tokenizer` told its tools, for conversations and prompts."""
    rows = list(read_rows(folder / f"{split}.jsonl", kind.from_row))
    return rows if tokenizer is None else told(rows, tokenizer)


def told(rows: Sequence[Any], tokenizer: Tokenizer) -> list[Any]:
    """Conversations or prompts whose tools are spelled out as they will be when the model writes (see `offered`)."""
    if tokenizer.has_own_form:
        return list(rows)
    return [row.offering(offered(tokenizer, row.tools)) if row.tools else row for row in rows]


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
