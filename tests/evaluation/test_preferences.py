"""Win rates, judges and intervals, by hand and by simulation."""

from __future__ import annotations

import math
import random

import pytest

from nestling.core.intervals import Interval, bootstrap, wilson
from nestling.evaluation.preferences import mean_score, win_rate_by_scores


def test_win_rate_by_hand() -> None:
    # Win, loss, tie, win: (1 + 0 + 0.5 + 1) / 4.
    result = win_rate_by_scores([3, 1, 2, 2], [1, 2, 2, 1])
    assert (result.value, result.n, result.ties) == (0.625, 4, 1)
    assert result.interval.low < 0.625 < result.interval.high
    assert result.to_row() == {"value": 0.625, "n": 4, "ties": 1, "interval": list(result.interval)}
    assert mean_score([1.0, 2.0]).to_row()["interval"] == list(bootstrap([1.0, 2.0]))


def test_scores_within_the_margin_tie() -> None:
    known = [win_rate_by_scores([2], [other], margin=1) for other in (0, 1, 2, 3, 4)]
    assert [(found.value, found.ties) for found in known] == [(1.0, 0), (0.5, 1), (0.5, 1), (0.5, 1), (0.0, 0)]


def test_swapping_the_sides_mirrors_the_result() -> None:
    one, other = [3, 1, 2, 1], [1, 2, 2, 0]
    there, back = (win_rate_by_scores(*pair) for pair in ((one, other), (other, one)))
    assert there.value == 1 - back.value
    assert there.interval.low == pytest.approx(1 - back.interval.high, abs=0.1)


def test_unequal_and_empty_inputs_are_refused() -> None:
    with pytest.raises(ValueError):
        win_rate_by_scores([1.0], [1.0, 2.0])
    with pytest.raises(ValueError):
        win_rate_by_scores([], [])
    with pytest.raises(ValueError):
        mean_score([])


def test_wilson_against_its_quadratic() -> None:
    """The bounds are the two shares p at which (share - p)^2 = z^2 p (1 - p) / n."""
    for successes, n in ((0, 5), (3, 10), (97, 100), (10, 10)):
        share = successes / n
        for p in wilson(successes, n):
            assert (share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-6)
    assert wilson(0, 0) == Interval(0.0, 1.0)


def test_bootstrap_is_wider_when_units_of_a_cluster_agree() -> None:
    """Ten prompts of 20 pairs, each all right or all wrong: 200 pairs, but only ten independent ones."""
    totals = [20.0] * 7 + [0.0] * 3
    clustered = bootstrap(totals, [20.0] * 10)
    naive = wilson(140, 200)
    assert clustered.high - clustered.low > 3 * (naive.high - naive.low)
    assert bootstrap(totals, [20.0] * 10) == clustered


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    stream = random.Random(0)
    covered = 0
    for _ in range(200):
        interval = bootstrap([stream.gauss(3, 1) for _ in range(40)], draws=400)
        covered += interval.low <= 3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_of_nothing_is_no_number() -> None:
    assert all(math.isnan(bound) for bound in bootstrap([]))
