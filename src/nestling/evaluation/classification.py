"""How good a classifier's scores are: area under the curve, precision and recall, calibration, thresholds, confusion.

Pure functions of scores and truth, one category at a time unless said otherwise. Texts that say the same thing in other
words (one *group*) stand or fall together, so every interval counts groups, not texts. Letters: N texts, L categories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nestling.core.config import Config
from nestling.core.intervals import Interval, bootstrap, wilson

Numbers = NDArray[np.float64]
Truth = NDArray[np.bool_]
_DRAWS = 400


class ThresholdSettings(Config):
    """What a category's threshold is chosen for."""

    rule: Literal["best_f1", "false_positive_rate"] = Field(
        "best_f1", description="Largest F1, or the most recall that a false-positive rate allows."
    )
    at_most: float = Field(0.01, gt=0, lt=1, description="The rate that rule false_positive_rate keeps to.")


@dataclass(frozen=True)
class Calibration:
    """What turns a category's logit into a score and a verdict: flagged where sigmoid(scale · logit + shift) > threshold.

    ``Calibration(scale=0.8, shift=-0.3, threshold=0.46)``; ``trained`` is false of a category that no text was
    labelled with: its score is always 0, and it is never flagged.
    """

    scale: float = 1.0
    shift: float = 0.0
    threshold: float = 0.5
    trained: bool = True

    def scores(self, logits: Numbers) -> Numbers:
        """Calibrated probabilities ``[N]``."""
        return sigmoid(self.scale * logits + self.shift) if self.trained else np.zeros(len(logits))

    def to_row(self) -> dict[str, Any]:
        """The JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Figure:
    """A measured number with its 95 % interval; ``n`` is what it was measured on. None: there was nothing to measure."""

    value: float | None
    interval: Interval | None
    n: int

    def to_row(self) -> dict[str, Any]:
        """The entry of report.json."""
        return {"value": self.value, "interval": None if self.interval is None else list(self.interval), "n": self.n}


@dataclass(frozen=True)
class Quality:
    """How well one category is told from the rest of the texts that were judged for it."""

    positives: int
    negatives: int
    precision: Figure
    recall: Figure
    f1: Figure
    false_positive_rate: Figure
    auc: Figure
    calibration_error: Figure

    def to_row(self) -> dict[str, Any]:
        """The entry of report.json."""
        return {key: value.to_row() if isinstance(value, Figure) else value for key, value in vars(self).items()}


def sigmoid(logits: Numbers) -> Numbers:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -logits))


def measure(scores: Numbers, flagged: Truth, truth: Truth, groups: Sequence[str]) -> Quality:
    """All figures of one category: scores in [0, 1], what was flagged and what is true, ``[N]`` each, and the groups."""
    group = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1].reshape(-1)
    right = flagged & truth
    wrong = flagged != truth
    twice = 2.0 * right.astype(np.float64)
    all_three = twice + wrong
    error = calibration_error(scores, truth)
    return Quality(
        positives=int(truth.sum()),
        negatives=int((~truth).sum()),
        precision=_share(right, flagged, group),
        recall=_share(right, truth, group),
        f1=Figure(_ratio(twice.sum(), all_three.sum()), _resampled(twice, all_three, group), len(truth)),
        false_positive_rate=_share(flagged & ~truth, ~truth, group),
        auc=_auc_figure(scores, truth, group),
        calibration_error=Figure(error, _error_interval(scores, truth, group), len(truth)),
    )


def _share(part: Truth, whole: Truth, group: NDArray[np.intp]) -> Figure:
    """The share of ``whole`` that is ``part``. The interval is Wilson's for as many draws as there are groups in it."""
    share = _ratio(part.sum(), whole.sum())
    if share is None:
        return Figure(None, None, 0)
    draws = len(np.unique(group[whole]))
    return Figure(share, wilson(share * draws, draws), int(whole.sum()))


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _resampled(totals: Numbers, counts: Numbers, group: NDArray[np.intp]) -> Interval | None:
    sums, sizes = (np.bincount(group, weights=values) for values in (totals, counts))
    return bootstrap(sums.tolist(), sizes.tolist()) if sizes.sum() else None


# ---- order ----


def auc(scores: Numbers, truth: Truth) -> float | None:
    """The chance that a positive text scores higher than a negative one, a tie counting half; None without either.

    >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    0.75
    """
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[place.reshape(-1)]
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_interval(area: float, positives: int, negatives: int) -> Interval:
    """The score interval of an area under the curve (Newcombe 2006, method 5), which is honest at 0 and 1 too."""
    z, half = 1.959964, (positives + negatives) / 2 - 1

    def outside(theta: float) -> float:
        spread = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
        return (theta - area) ** 2 - z**2 * theta * (1 - theta) * spread / (positives * negatives)

    return Interval(0.0 if area == 0 else _root(outside, 0.0, area), 1.0 if area == 1 else _root(outside, 1.0, area))


def _root(function: Callable[[float], float], outer: float, inner: float) -> float:
    """Where the function changes its sign between ``outer`` (positive) and ``inner`` (not positive), by bisection."""
    for _ in range(60):
        middle = (outer + inner) / 2
        outer, inner = (middle, inner) if function(middle) > 0 else (outer, middle)
    return inner


def _auc_figure(scores: Numbers, truth: Truth, group: NDArray[np.intp]) -> Figure:
    area = auc(scores, truth)
    if area is None:
        return Figure(None, None, len(truth))
    sizes = (len(np.unique(group[part])) for part in (truth, ~truth))
    return Figure(area, auc_interval(area, *sizes), len(truth))


# ---- calibration ----


def calibration_error(scores: Numbers, truth: Truth, bins: int = 10, weights: Numbers | None = None) -> float:
    """Expected calibration error: |mean score - share of positives|, averaged over equal bins (Guo et al. 2017)."""
    weight = np.ones(len(scores)) if weights is None else weights
    place = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=weight * (scores - truth), minlength=bins)
    return float(np.abs(gaps).sum() / weight.sum())


def reliability(scores: Numbers, truth: Truth, bins: int = 10) -> list[dict[str, float]]:
    """Of every bin of scores that has any: their mean, the share that was true, and their number."""
    place = np.minimum((scores * bins).astype(int), bins - 1)
    count, total, true = (
        np.bincount(place, weights=of, minlength=bins) for of in (np.ones(len(scores)), scores, truth)
    )
    return [{"score": float(total[n] / count[n]), "share": float(true[n] / count[n]), "n": int(count[n])}
            for n in np.flatnonzero(count)]  # fmt: skip


def _error_interval(scores: Numbers, truth: Truth, group: NDArray[np.intp]) -> Interval:
    stream = np.random.default_rng(0)
    count = int(group.max()) + 1
    times = stream.multinomial(count, np.full(count, 1 / count), size=_DRAWS).astype(np.float64)
    errors = [calibration_error(scores, truth, weights=draw[group]) for draw in times]
    low, high = np.quantile(errors, [0.025, 0.975])
    return Interval(float(low), float(high))


def platt(logits: Numbers, truth: Truth, steps: int = 50) -> tuple[float, float]:
    """(scale, shift) that make sigmoid(scale · logit + shift) a probability, by logistic regression (Platt 1999).

    The targets are Platt's (n₊ + 1) / (n₊ + 2) and 1 / (n₋ + 2), not 1 and 0, so that a perfect order of few texts does
    not become certainty. Newton steps, halved until the loss falls.
    """
    positives, negatives = truth.sum(), (~truth).sum()
    target = np.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    design = np.stack([logits, np.ones(len(logits))], axis=1)

    def loss(weights: Numbers) -> float:
        z = design @ weights
        return float((np.logaddexp(0.0, z) - target * z).sum())

    weights = np.array([0.0, float(np.log((positives + 1) / (negatives + 1)))])
    for _ in range(steps):
        p = sigmoid(design @ weights)
        gradient = design.T @ (p - target)
        curvature = design.T @ (design * (p * (1 - p))[:, None]) + 1e-9 * np.eye(2)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while loss(weights - size * step) > loss(weights) and size > 1e-6:
            size /= 2
        weights = weights - size * step
        if np.abs(gradient).max() < 1e-8 * len(logits):
            break
    return float(weights[0]), float(weights[1])


def calibrate(logits: Numbers, truth: Truth, settings: ThresholdSettings) -> Calibration:
    """Scale, shift and threshold of one trained category, from texts that it did not learn.

    Without both kinds of text there is nothing to fit: the logit is taken as it is, and flagged above one half.
    """
    if not truth.any() or truth.all():
        return Calibration()
    scale, shift = platt(logits, truth)
    if scale <= 0:  # its order is no better than chance: nothing that it says is worth a flag
        return Calibration(0.0, shift, 1.0)
    cut = choose_threshold(scale * logits + shift, truth, settings)
    return Calibration(scale, shift, float(sigmoid(np.array([cut]))[0]))


def choose_threshold(logits: Numbers, truth: Truth, settings: ThresholdSettings) -> float:
    """The logit above which to flag: halfway between two texts' logits, or one beyond the outermost.

    Among cuts that are equally good, the one in the widest gap.
    """
    values = np.unique(logits)
    edges = np.concatenate([[values[0] - 2], values, [values[-1] + 2]])
    cuts, gaps = (edges[1:] + edges[:-1]) / 2, edges[1:] - edges[:-1]
    order = np.sort(logits[truth]), np.sort(logits[~truth])
    hits, alarms = (len(side) - np.searchsorted(side, cuts, side="right") for side in order)
    if settings.rule == "best_f1":
        merit = 2 * hits / (hits + alarms + len(order[0]))
    else:
        merit = np.where(alarms <= settings.at_most * len(order[1]), hits, -1)
    best = merit == merit.max()
    return float(cuts[np.argmax(np.where(best, gaps, -1.0))])


# ---- all categories ----


def confusion(truth: Truth, flagged: Truth, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """What texts of a category were taken for: ``{true: {said: texts}}``, with "none" on both sides.

    Of a text with several categories (Heydarian et al. 2022): what was found stands on the diagonal; each one missed is
    set against each one wrongly said, or "none"; what was said too much stands in the row of every true one, or "none".
    """
    labels = [*names, "none"]
    table = np.zeros((len(labels), len(labels)), dtype=int)
    none = len(names)
    for true, said in zip(truth, flagged, strict=True):
        right, missed, extra = (np.flatnonzero(part) for part in (true & said, true & ~said, said & ~true))
        table[right, right] += 1
        for row in missed if len(missed) else np.flatnonzero(true):
            columns = extra if len(extra) else ([none] if len(missed) else [])
            table[row, columns] += 1
        if not true.any():
            table[none, extra if len(extra) else [none]] += 1
    rows = zip(labels, table.tolist(), strict=True)
    return {name: {said: n for said, n in zip(labels, row, strict=True) if n} for name, row in rows}


def macro(qualities: Mapping[str, Quality], figure: str) -> float | None:
    """The mean of one figure over the categories that have it."""
    values = [value for quality in qualities.values() if (value := getattr(quality, figure).value) is not None]
    return sum(values) / len(values) if values else None
