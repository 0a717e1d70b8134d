"""Train the moderation model: from labelled texts to calibrated scores and a threshold for every category.

Calibration and thresholds come from the texts held out. So that no text is judged by what it helped to choose, they are
measured by cross-fitting: the texts are dealt into folds, a group (`meta.group`, else the text) always into one, and each
fold is judged by the calibration of the others. The model that is saved is calibrated on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from nestling.core.config import nearest
from nestling.core.errors import UserError
from nestling.core.metrics import say
from nestling.core.pipeline import StageContext
from nestling.core.runtime import torch_stream
from nestling.core.storage import write_rows
from nestling.core.types import Labelled
from nestling.corpus.splits import unit_hash
from nestling.evaluation.classification import (
    Calibration,
    Quality,
    ThresholdSettings,
    calibrate,
    confusion,
    macro,
    measure,
    reliability,
)  # fmt: skip
from nestling.loading.chats import TooLong
from nestling.loading.labels import LabelLoader
from nestling.model import checkpoint
from nestling.model.checkpoint import Checkpoint
from nestling.model.config import DecoderConfig
from nestling.model.decoder import build
from nestling.model.hub import make_config
from nestling.model.locate import checkpoint_folder
from nestling.objectives import classify
from nestling.objectives._materials import Materials
from nestling.planning.work import Known, Work
from nestling.stages._preflight import measured
from nestling.stages._training import TrainingStage, figures, materials, optimise, read_split, save_model
from nestling.stages.sft import with_chat_tokens
from nestling.tokenizer.bpe import Tokenizer

VERSION = 2
READS = {"labels": "labels", "start?": "sft", "tokenizer?": "tokenizer"}

CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
"""The names of OpenAI's moderation endpoint."""
LONG = 300
"""Characters: in a longer text harm stands among ordinary sentences, behind which it can hide."""
MACRO = ("f1", "precision", "recall", "auc", "calibration_error")
SUFFIXES = {"": "value", "_interval": "interval", "_n": "n"}


class Settings(TrainingStage):
    """What is told apart, and how it is learnt. Without an input `start`, new weights over `tokenizer` are trained."""

    categories: tuple[str, ...] = Field(CATEGORIES, min_length=1, description="Labels, in the order of the logits.")
    model: dict[str, Any] = Field({}, description="Architecture and sizes of a model trained from nothing.")
    batch_rows: int = Field(32, ge=1, description="Texts per step, over all ranks.")
    too_long: TooLong = Field("cut", description="What happens to a text longer than the context.")
    threshold: ThresholdSettings = ThresholdSettings()
    """The rule that thresholds follow."""
    thresholds: dict[str, ThresholdSettings] = Field({}, description="Another rule for some categories.")
    flagged_at_most: float | None = Field(
        None, gt=0, lt=1, description="Share of harmless texts flagged for anything: one level, below which no threshold lies."
    )
    folds: int = Field(5, ge=2, description="Parts of the held-out texts, each judged by the others' calibration.")
    mistakes: int = Field(200, ge=0, description="Wrongly judged test texts that are kept to look at.")
    objective: classify.Settings = classify.Settings()
    regular: ClassVar[bool] = classify.Classify.fixed_shapes


def work(settings: Settings, known: Known) -> Work:
    """What a step reads, before the texts are known: each as long as the context."""
    start, size = known.get("start"), known.get("tokenizer", DecoderConfig.model_fields["vocab_size"].default)
    model = start if isinstance(start, DecoderConfig) else make_config({**settings.model, "vocab_size": size})
    steps, pieces = settings.training.steps, settings.objective.microbatches
    return Work((model,), steps, settings.batch_rows, model.context, microbatches=pieces, logits=False, exact=False)


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Train, calibrate, choose thresholds; report each category's figures on texts that had no part in any of it.

    Raises:
        UserError: a threshold for no category, too few texts held out, or an earlier model with other categories.
    """
    for name in settings.thresholds:
        if name not in settings.categories:
            raise UserError("no such category", where="thresholds", value=name, fix=nearest(name, settings.categories))
    stuff, tokenizer, size = _start(settings, context)
    texts, held_out = (
        LabelLoader(
            read_split(context.reads["labels"], split, Labelled), tokenizer, size,
            settings.batch_rows, context.seed, settings.categories, too_long=settings.too_long,
        )
        for split in ("train", "val")
    )  # fmt: skip
    fold = folds(held_out.rows, settings.folds)
    given = {**stuff.given, "texts": texts, "held_out": held_out}
    objective = classify.build(settings.objective, replace(stuff, given=given))
    reading = measured(work(settings, {"start": objective.model.decoder.config}), texts)
    result = optimise(objective, settings.training, context, work=reading)
    objective.model.eval()
    trained = texts.targets.any(dim=0).tolist()
    logits = objective.logits(held_out).double().numpy()
    calibrations = _calibrations(settings, trained, held_out, logits, np.ones(len(fold), dtype=bool))
    exam = _cross_fitted(settings, trained, held_out, logits, fold)
    write_rows(context.folder / "mistakes.jsonl", exam.mistakes()[: settings.mistakes])
    last = result.history[-1]
    report = {
        **figures(result),
        **{name: value for name, value in last.items() if name.startswith("val_")},
        "train_texts": len(texts.rows),
        "test_texts": len(held_out.rows),
        "test_groups": len({group_of(row) for row in held_out.rows}),
        "dropped": texts.dropped,
        "cut": texts.cut,
        **exam.report(calibrations),
        "bars": settings.bars,
    }
    rows = {name: calibration.to_row() for name, calibration in calibrations.items()}
    save_model(context, objective.model.decoder, tokenizer, report, objective.model.head, calibration=rows)
    if report["never_trained"] and not context.quiet:
        say(f"never trained, always 0: {', '.join(report['never_trained'])}; give texts labelled so")
    return report


def _start(settings: Settings, context: StageContext) -> tuple[Materials, Tokenizer, int]:
    """What is trained (a decoder, or a classifier of an earlier round), its tokenizer and its context."""
    stuff = materials(context)
    if "start" not in context.reads:
        if "tokenizer" not in context.reads:
            raise UserError("needs a model to start from, or a tokenizer for a new one", where=f"{context.name}.reads")
        tokenizer = Tokenizer.load(context.reads["tokenizer"])
        config = make_config({**settings.model, "vocab_size": tokenizer.vocab_size}, f"{context.name}.model")
        found = with_chat_tokens(Checkpoint(build(config, torch_stream(context.seed, "weights")), tokenizer), context.seed)
        return replace(stuff, models={"model": found}), found.tokenizer, config.context
    folder = checkpoint_folder(context.reads["start"])
    if not checkpoint.is_classifier(folder):
        found = with_chat_tokens(checkpoint.load(folder, context.runtime.device), context.seed)
        return replace(stuff, models={"model": found}), found.tokenizer, found.model.config.context
    earlier = checkpoint.load_classifier(folder, context.runtime.device)
    if earlier.model.head.labels != settings.categories:
        fix = f"set categories to {', '.join(earlier.model.head.labels)}"
        raise UserError("the model to start from has other categories", where=folder, fix=fix)
    given = {"classifier": earlier.model}
    return replace(stuff, given=given), earlier.tokenizer, earlier.model.decoder.config.context


def group_of(row: Labelled) -> str:
    """What a text says, however it is worded: `meta.group`, else the text."""
    return str(row.meta.get("group") or row.text)


def folds(rows: Sequence[Labelled], count: int) -> np.ndarray:
    """The fold of each text, [N], from 0 to count - 1; the groups of each set of labels are dealt out in turn.

    Raises:
        UserError: there are fewer groups than folds.
    """
    labels = {group_of(row): row.labels for row in rows}
    if len(labels) < count:
        fix = "raise val_share, or lower folds"
        raise UserError("too few groups of texts are held out", where="labels", value=len(labels), fix=fix)
    dealt = sorted(labels, key=lambda group: (labels[group], unit_hash(group)))
    place = {group: n % count for n, group in enumerate(dealt)}
    return np.array([place[group_of(row)] for row in rows])


def _calibrations(
    settings: Settings, trained: Sequence[bool], held_out: LabelLoader, logits: np.ndarray, chosen: np.ndarray
) -> dict[str, Calibration]:
    """Of each category, from the chosen texts, [N] bool. A category that no training text has was never trained."""
    found = {name: Calibration(threshold=1.0, trained=False) for name in settings.categories}
    for place, name in enumerate(settings.categories):
        if trained[place]:
            judged = held_out.judged[:, place].numpy() & chosen
            truth = held_out.targets[:, place].bool().numpy()[judged]
            found[name] = calibrate(logits[judged, place], truth, settings.thresholds.get(name, settings.threshold))
    if settings.flagged_at_most is None:
        return found
    harmless = logits[chosen & ~held_out.targets.bool().numpy().any(axis=1)]
    level = _level(list(found.values()), harmless, settings.flagged_at_most)
    return {name: replace(one, threshold=max(one.threshold, level)) for name, one in found.items()}


def _level(calibrations: Sequence[Calibration], harmless: np.ndarray, at_most: float) -> float:
    """The lowest score which, asked of all categories alike, flags at most this share of harmless texts, ``[N, L]`` logits.

    Scores are probabilities, so one level for all asks the same certainty of each: none is strict for another's mistakes.
    """
    scores = np.stack([one.scores(column) for one, column in zip(calibrations, harmless.T, strict=True)], axis=1)
    over = scores > [one.threshold for one in calibrations]
    highest = np.sort(np.where(over, scores, 0.0).max(axis=1))[::-1]  # [N]
    return float(highest[int(at_most * len(highest))]) if len(highest) else 0.0


def _cross_fitted(
    settings: Settings, trained: Sequence[bool], held_out: LabelLoader, logits: np.ndarray, fold: np.ndarray
) -> _Exam:
    """Every held-out text, judged by a calibration that it had no part in."""
    scores, flagged = np.zeros(logits.shape), np.zeros(logits.shape, dtype=bool)
    for number in range(settings.folds):
        mine = fold == number
        others = _calibrations(settings, trained, held_out, logits, ~mine)
        for place, calibration in enumerate(others.values()):
            scores[mine, place] = calibration.scores(logits[mine, place])
            flagged[mine, place] = scores[mine, place] > calibration.threshold
    return _Exam(settings.categories, held_out, scores, flagged)


@dataclass(frozen=True)
class _Exam:
    """Scores and flags ``[N, L]`` of the held-out texts, and what follows from them."""

    categories: tuple[str, ...]
    texts: LabelLoader
    scores: np.ndarray
    flagged: np.ndarray

    @property
    def judged(self) -> np.ndarray:
        """Whether anybody looked, ``[N, L]``."""
        return self.texts.judged.numpy()

    @property
    def truth(self) -> np.ndarray:
        """What applies, ``[N, L]`` bool; false where nobody looked."""
        return self.texts.targets.bool().numpy() & self.judged

    def report(self, calibrations: dict[str, Calibration]) -> dict[str, Any]:
        """Every category's figures, the verdict of all together, and what is taken for what."""
        found = {name: self._quality(place) for place, name in enumerate(self.categories)}
        trained = {name: quality for name, quality in found.items() if calibrations[name].trained}
        return {
            **{f"macro_{figure}": macro(trained, figure) for figure in MACRO},
            **self._verdict("flagged"),
            **self._verdict("long_flagged", longer=LONG),
            "flagged_by_kind": self._by_kind(),
            "categories": {name: found[name].to_row() | calibrations[name].to_row() for name in self.categories},
            "never_trained": [name for name in self.categories if name not in trained],
            "reliability": reliability(self.scores[self.judged], self.truth[self.judged]),
            "confusion": confusion(self.truth, self.flagged & self.judged, self.categories),
        }

    def _quality(self, place: int) -> Quality:
        rows = np.flatnonzero(self.judged[:, place])
        scores, flagged, truth = (part[rows, place] for part in (self.scores, self.flagged, self.truth))
        return measure(scores, flagged, truth, [group_of(self.texts.rows[row]) for row in rows])

    def _verdict(self, said: str, longer: int = -1) -> dict[str, Any]:
        """"Flagged at all", on texts judged for every category and longer than this: {said}_recall, {said}_auc_n, …"""
        length = np.array([len(row.text) for row in self.texts.rows])
        rows = np.flatnonzero(self.judged.all(axis=1) & (length > longer))
        flagged, truth = (np.asarray(part[rows].any(axis=1)) for part in (self.flagged, self.truth))
        groups = [group_of(self.texts.rows[row]) for row in rows]
        found: dict[str, Any] = {}
        if len(rows):
            quality = measure(self.scores[rows].max(axis=1), flagged, truth, groups)
            for name in ("precision", "recall", "false_positive_rate", "auc"):
                figure = getattr(quality, name).to_row()
                found |= {f"{said}_{name}{end}": figure[key] for end, key in SUFFIXES.items()}
        return found

    def _by_kind(self) -> dict[str, dict[str, float]]:
        """How much of each kind of text (`meta.kind`, where rows have one) was flagged, and how much should have been."""
        kinds: dict[str, list[int]] = {}
        for place, row in enumerate(self.texts.rows):
            kinds.setdefault(str(row.meta.get("kind", "")), []).append(place)
        flagged, truth = (np.atleast_1d(part.any(axis=1)) for part in (self.flagged, self.truth))
        return {
            kind: {"flagged": float(flagged[rows].mean()), "wanted": float(truth[rows].mean()), "texts": len(rows)}
            for kind, rows in sorted(kinds.items())
            if kind
        }

    def mistakes(self) -> list[dict[str, Any]]:
        """The texts with a wrong verdict on any category: wholly missed, wrongly flagged, then mixed up."""
        wrong = (self.flagged != self.truth) & self.judged
        rows = []
        for place in np.flatnonzero(wrong.any(axis=1)).tolist():
            said = [name for name, is_flagged in zip(self.categories, self.flagged[place], strict=True) if is_flagged]
            scores = {self.categories[n]: round(float(self.scores[place, n]), 4) for n in np.flatnonzero(wrong[place])}
            row = self.texts.rows[place]
            rows.append({"text": row.text, "labels": list(row.labels), "flagged": said, "scores": scores})
        return sorted(rows, key=lambda row: (bool(row["flagged"]) + bool(row["flagged"] and row["labels"])))
