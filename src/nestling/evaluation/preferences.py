"""Which of two sets of responses to the same prompts is preferred, and by how much, where each response has its score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nestling.core.intervals import Interval, bootstrap


@dataclass(frozen=True)
class Mean:
    """A mean over prompts with its bootstrap interval. ``Mean(value=0.71, n=200, interval=Interval(0.68, 0.74))``."""

    value: float
    n: int
    interval: Interval

    def to_row(self) -> dict[str, Any]:
        """The entry of report.json."""
        return vars(self) | {"interval": list(self.interval)}


@dataclass(frozen=True)
class WinRate(Mean):
    """The share of prompts on which A was preferred to B, a tie counting half.

    ``WinRate(value=0.65, n=200, interval=Interval(0.59, 0.71), ties=30)``
    """

    ties: int


def win_rate_by_scores(first: Sequence[float], second: Sequence[float], margin: float = 0.0) -> WinRate:
    """How often the ``first`` of two scores is higher; those within ``margin`` of each other tie.

    The interval resamples prompts.

    Raises:
        ValueError: the two sequences differ in length, or are empty.
    """
    points = [0.5 if abs(a - b) <= margin else float(a > b) for a, b in zip(first, second, strict=True)]
    return WinRate(**vars(mean_score(points)), ties=points.count(0.5))


def mean_score(values: Sequence[float]) -> Mean:
    """The mean of one figure per prompt (true reward, divergence from the reference, length) and its interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to average")
    return Mean(sum(values) / len(values), len(values), bootstrap(values))
