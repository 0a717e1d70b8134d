"""Pre-train a base model on token shards: next-token prediction on plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from pydantic import Field, model_validator

from nestling.core.config import parse
from nestling.core.errors import UserError
from nestling.core.pipeline import StageContext
from nestling.core.registry import find
from nestling.core.runtime import torch_stream
from nestling.lineage.ngram import unigram_entropy
from nestling.loading.repeats import Counted, copies
from nestling.loading.shards import Shards
from nestling.loading.text import RowMode, TextLoader
from nestling.model.checkpoint import Checkpoint
from nestling.model.config import DecoderConfig
from nestling.model.decoder import build
from nestling.model.depth import rates, with_depth
from nestling.objectives import next_token
from nestling.planning.work import Known, Work
from nestling.stages._training import Adaptable, SampleWriter, figures, materials, optimise, save_model, starting_model
from nestling.tokenizer.bpe import Tokenizer
from nestling.training.health import Expected
from nestling.training.settings import TrainSettings

VERSION = 1
COUNTED = 50_000_000  # tokens of which single ones are counted
READS = {"tokens": "tokenize", "tokenizer": "tokenizer", "baseline?": "ngram", "start?": ""}


class Settings(Adaptable):
    """A base model and how it is trained. With an input `start`, that model is trained further instead."""

    model: dict[str, Any] = Field(
        {},
        description="Architecture and sizes; vocabulary and context are filled in. {depth: 6} sets all sizes and the "
        "learning rates that go with them; what is named beside it wins.",
    )
    context: int = Field(256, ge=8, description="Tokens per row.")
    batch_rows: int = Field(32, ge=1, description="Rows per step, over all ranks.")
    rows: RowMode = Field("documents", description="Whole documents packed, or the running stream.")
    most_epochs: float = Field(
        0.0, ge=0, description="Most passes over the text: a small text gets fewer steps than asked for; 0: no limit."
    )
    objective: next_token.Settings = next_token.Settings()
    sample_every: int = Field(0, ge=0, description="Steps between sampled texts; 0 samples at the end only.")
    samples: tuple[str, ...] = Field(("",), description="Prompts of the sampled texts; empty begins a new document.")

    @model_validator(mode="before")
    @classmethod
    def _depth_sets_rates(cls, settings: Any) -> Any:
        """The rates that suit a model given by its depth, where the settings name none."""
        model, lesson = settings.get("model"), settings.get("training")
        if isinstance(lesson, TrainSettings):
            lesson = lesson.model_dump(exclude_unset=True)
        if not isinstance(model, Mapping) or "depth" not in model or not isinstance(lesson, Mapping):
            return settings
        if (optimizer := lesson.get("optimizer", "muon")) == "muon":
            return {**settings, "training": {**rates(with_depth(model)["d_model"]), **lesson}}
        if "learning_rate" not in lesson:
            fix = "set training.learning_rate"
            raise UserError("depth knows the rates of muon only", where="model.depth", value=optimizer, fix=fix)
        return settings

    @model_validator(mode="after")
    def _sizes_fit(self) -> Settings:
        self.decoder(vocab_size=257)
        return self

    def lesson(self, row_count: int) -> TrainSettings:
        """How to train on `row_count` rows: with no more steps than `most_epochs` allow, lest the text is memorised."""
        if not self.most_epochs:
            return self.training
        steps = max(1, round(self.most_epochs * row_count / self.batch_rows))
        return self.training.model_copy(update={"steps": min(steps, self.training.steps)})

    def decoder(self, vocab_size: int) -> DecoderConfig:
        """The decoder's configuration over a vocabulary."""
        architecture = find("model.architectures", self.model.get("architecture", "qwen3"), "model.architecture")
        sizes = {"context": self.context, **self.model, "vocab_size": vocab_size}
        return parse(architecture.Config, sizes, "model")


def work(settings: Settings, known: Known) -> Work:
    """What a step reads: packed rows, of a model made here or of the one that is trained further."""
    start, size = known.get("start"), known.get("tokenizer", DecoderConfig.model_fields["vocab_size"].default)
    model = start if isinstance(start, DecoderConfig) else settings.decoder(int(size))
    return Work(
        (model,),
        settings.training.steps,
        settings.batch_rows,
        settings.context,
        microbatches=settings.objective.microbatches,
        packed=settings.rows != "windows",
        adapters=settings.adapters,
    )


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Train; report bits per byte beside the n-gram's, where that stage ran."""
    tokenizer = Tokenizer.load(context.reads["tokenizer"])
    loaders = {
        split: TextLoader(
            Shards.open(context.reads["tokens"] / split, tokenizer),
            settings.context,
            settings.batch_rows,
            context.seed,
            settings.rows,
        )
        for split in ("train", "val")
    }
    counted = Counted(loaders["train"])
    stuff = materials(context, batches=counted, validation=loaders["val"].validation)
    if "start" in context.reads:
        stuff = replace(stuff, models={"model": starting_model(settings, context, "start")})
    elif settings.adapters is not None:
        fix = "name the model as the input `start`"
        raise UserError("adapters need a model to start from", where=f"{context.name}.adapters", fix=fix)
    else:
        fresh = build(settings.decoder(tokenizer.vocab_size), torch_stream(context.seed, "weights"))
        stuff = replace(stuff, models={"model": Checkpoint(fresh, tokenizer)})
    objective = next_token.build(settings.objective, stuff)
    writer = SampleWriter(context, objective.model, tokenizer, settings.samples)
    expected, lesson = _expected(context, loaders, tokenizer), settings.lesson(loaders["train"].row_count)
    reading = work(settings, {"start": objective.model.config})
    result = optimise(objective, lesson, context, [writer.hook(settings.sample_every)], expected, reading)
    last = result.history[-1]
    epochs = result.steps * settings.batch_rows / loaders["train"].row_count
    report = {
        **figures(result),
        "val_bpb": last.get("val_bpb"),
        "val_loss": last.get("val_loss"),
        "parameters": objective.model.parameter_count(),
        "row_fill": round(loaders["train"].fill, 4),
        "epochs": round(epochs, 3),
        "repeated_share": counted.repeated_share(epochs),
        **copies(loaders["train"].shards, loaders["val"].shards),
        "expected": asdict(expected),
        "bars": settings.bars,
    }
    if "baseline" in context.reads:
        baseline = context.report_of("baseline")
        report |= {"ngram_bpb": baseline["val_bpb"], "unigram_bpb": baseline["unigram_bpb"]}
        report["bpb_against_ngram"] = round(report["val_bpb"] / baseline["val_bpb"], 4)
    save_model(context, objective.model, tokenizer, report)
    return report


def _expected(context: StageContext, loaders: Mapping[str, TextLoader], tokenizer: Tokenizer) -> Expected:
    """Guessing, single tokens, and the n-gram model where its stage ran, in nats per token."""
    train, val = loaders["train"].shards, loaders["val"].shards
    unigram = unigram_entropy(train[:COUNTED], tokenizer.vocab_size) * math.log(2)
    ngram = None
    if "baseline" in context.reads and val.tokens:
        ngram = context.report_of("baseline")["val_bpb"] * math.log(2) * val.bytes / val.tokens
    return Expected(math.log(tokenizer.vocab_size), unigram, ngram, float(train.tokens))
