"""Which of two sets of responses to the same prompts is preferred, and by how much. The judge is an argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nestling.core.intervals import Interval, bootstrap
from nestling.core.types import PromptRow, Scorer

Judge = Callable[[PromptRow, str, str], float]
"""1 when the first response is preferred, 0 when the second is, 0.5 for a tie."""


@dataclass(frozen=True)
class WinRate:
    """The share of prompts on which A was preferred to B, a tie counting half.

    ``WinRate(value=0.65, n=200, ties=30, interval=Interval(0.59, 0.71))``
    """

    value: float
    n: int
    ties: int
    interval: Interval

    def to_row(self) -> dict[str, Any]:
        """The entry of report.json."""
        return {"value": self.value, "n": self.n, "ties": self.ties, "interval": list(self.interval)}


@dataclass(frozen=True)
class Mean:
    """A mean over prompts with its bootstrap interval. ``Mean(value=0.71, n=200, interval=Interval(0.68, 0.74))``."""

    value: float
    n: int
    interval: Interval

    def to_row(self) -> dict[str, Any]:
        """The entry of report.json."""
        return {"value": self.value, "n": self.n, "interval": list(self.interval)}


def by_score(scorer: Scorer, margin: float = 0.0) -> Judge:
    """A judge that prefers the response with the higher score; scores within ``margin`` of each other tie."""

    def judge(row: PromptRow, first: str, second: str) -> float:
        return _preferred(scorer(row, first), scorer(row, second), margin)

    return judge


def _preferred(first: float, second: float, margin: float) -> float:
    return 0.5 if abs(first - second) <= margin else float(first > second)


def in_both_orders(judge: Judge) -> Judge:
    """A judge without a position bias: both orders are asked, and a contradiction counts as a tie."""

    def fair(row: PromptRow, first: str, second: str) -> float:
        return 0.5 * (judge(row, first, second) + 1 - judge(row, second, first))

    return fair


def win_rate(rows: Sequence[PromptRow], first: Sequence[str], second: Sequence[str], judge: Judge) -> WinRate:
    """How often ``first`` is preferred to ``second``; the interval resamples prompts.

    Raises:
        ValueError: the three sequences differ in length, or are empty.
    """
    return _rate([judge(row, a, b) for row, a, b in zip(rows, first, second, strict=True)])


def win_rate_by_scores(first: Sequence[float], second: Sequence[float], margin: float = 0.0) -> WinRate:
    """As `win_rate` with the judge `by_score`, where each response has its score already.

    Raises:
        ValueError: the two sequences differ in length, or are empty.
    """
    return _rate([_preferred(a, b, margin) for a, b in zip(first, second, strict=True)])


def _rate(points: list[float]) -> WinRate:
    if not points:
        raise ValueError("no responses to compare")
    ties = sum(point == 0.5 for point in points)
    return WinRate(sum(points) / len(points), len(points), ties, bootstrap(points))


def mean_score(values: Sequence[float]) -> Mean:
    """The mean of one figure per prompt (true reward, divergence from the reference, length) and its interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to average")
    return Mean(sum(values) / len(values), len(values), bootstrap(values))
