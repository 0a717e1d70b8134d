"""How sure a measured figure is: confidence intervals for shares and means. 95 % unless told otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Where the true value lies with the stated confidence.

    >>> Interval(0.61, 0.79).low
    0.61
    """

    low: float
    high: float


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """The score interval of a share (Wilson 1927): honest at 0 of n, at n of n and for small n; (0, 1) when n is 0.

    >>> [round(bound, 3) for bound in wilson(10, 10)]
    [0.722, 1.0]
    """
    if n == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def bootstrap(
    totals: Sequence[float], counts: Sequence[float] | None = None, *, confidence: float = 0.95, draws: int = 2000
) -> Interval:
    """Percentile interval of ``sum(totals) / sum(counts)``, resampling whole clusters with replacement.

    A cluster is what was drawn independently (a prompt), ``totals`` its sum and ``counts`` its number of units (pairs);
    counts of one give the interval of a mean. Deterministic; (0, 1)-like bounds are not assumed.

    >>> bootstrap([1, 1, 1])
    Interval(low=1.0, high=1.0)
    """
    sums = np.asarray(totals, dtype=np.float64)
    sizes = np.ones_like(sums) if counts is None else np.asarray(counts, dtype=np.float64)
    if sums.size == 0 or sizes.sum() == 0:
        return Interval(math.nan, math.nan)
    stream = np.random.default_rng(0)
    # Drawing how often each cluster is taken is the same as drawing clusters, and needs no [draws, n] index array.
    times = stream.multinomial(sums.size, np.full(sums.size, 1 / sums.size), size=draws).astype(np.float64)
    below = times @ sizes
    means = (times @ sums)[below > 0] / below[below > 0]
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(low), float(high))
