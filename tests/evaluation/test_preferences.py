"""Win rates, judges and intervals, by hand and by simulation."""

from __future__ import annotations

import math
import random

import pytest

from nestling.core.intervals import Interval, bootstrap, wilson
from nestling.core.types import Message, PromptRow
from nestling.evaluation.preferences import by_score, in_both_orders, mean_score, win_rate, win_rate_by_scores

ROWS = [PromptRow(prompt=(Message(role="user", content=str(number)),)) for number in range(4)]


def length(row: PromptRow, text: str) -> float:
    return float(len(text))


def test_win_rate_by_hand() -> None:
    # Win, loss, tie, win: (1 + 0 + 0.5 + 1) / 4.
    result = win_rate(ROWS, ["aaa", "a", "aa", "aa"], ["a", "aa", "bb", "b"], by_score(length))
    assert (result.value, result.n, result.ties) == (0.625, 4, 1)
    assert result.interval.low < 0.625 < result.interval.high
    assert result.to_row()["interval"] == list(result.interval)


def test_win_rate_by_scores_is_win_rate_by_a_scorer() -> None:
    first, second = ["aaa", "a", "aa", "aa"], ["a", "aa", "bb", "b"]
    for margin in (0.0, 1.0):
        known = win_rate_by_scores([len(text) for text in first], [len(text) for text in second], margin)
        assert known == win_rate(ROWS, first, second, by_score(length, margin))
    with pytest.raises(ValueError):
        win_rate_by_scores([1.0], [1.0, 2.0])


def test_scores_within_the_margin_tie() -> None:
    judge = by_score(length, margin=1)
    assert [judge(ROWS[0], "aa", other) for other in ("", "a", "aa", "aaa", "aaaa")] == [1.0, 0.5, 0.5, 0.5, 0.0]


def test_both_orders_cancel_a_position_bias() -> None:
    def always_first(row: PromptRow, first: str, second: str) -> float:
        return 1.0

    assert win_rate(ROWS, ["a"] * 4, ["b"] * 4, always_first).value == 1.0
    assert win_rate(ROWS, ["a"] * 4, ["b"] * 4, in_both_orders(always_first)).value == 0.5


def test_swapping_the_sides_mirrors_the_result() -> None:
    one, other = ["aaa", "a", "aa", "a"], ["a", "aa", "bb", ""]
    there, back = (win_rate(ROWS, *pair, by_score(length)) for pair in ((one, other), (other, one)))
    assert there.value == 1 - back.value
    assert there.interval.low == pytest.approx(1 - back.interval.high, abs=0.1)


def test_unequal_and_empty_inputs_are_refused() -> None:
    with pytest.raises(ValueError):
        win_rate(ROWS, ["a"], ["b"] * 4, by_score(length))
    with pytest.raises(ValueError):
        win_rate([], [], [], by_score(length))
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
