"""Policies replayed on trials whose outcomes are known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nestling.core.errors import UserError
from nestling.core.types import Message
from nestling.evaluation.routing import Outcome, Table, Trial, choose


def trial(*outcomes: tuple[float, float]) -> Trial:
    pairs = zip(("small", "large"), outcomes, strict=False)
    return Trial(
        prompt=(Message(role="user", content="?"),),
        outcomes={name: Outcome(score=score, cost=cost) for name, (score, cost) in pairs},
    )


ROWS = [trial((1, 1), (1, 9)), trial((0, 2), (1, 10)), trial((0, 1), (0, 11)), trial((0.5, 2), (0.25, 10))]
TABLE = Table.of(ROWS, ("small", "large"))


def test_the_oracle_takes_the_best_and_of_equals_the_cheapest() -> None:
    assert TABLE.oracle().tolist() == [0, 1, 0, 0]
    oracle = TABLE.replay(TABLE.oracle())
    assert (oracle.accuracy, oracle.cost) == (2.5 / 4, 14 / 4)
    assert oracle.shares == {"small": 0.75, "large": 0.25}


def test_one_for_all() -> None:
    small, large = (TABLE.replay(TABLE.always(name)) for name in TABLE.names)
    assert (small.accuracy, small.cost, large.accuracy, large.cost) == (1.5 / 4, 1.5, 2.25 / 4, 10.0)
    assert TABLE.mean_costs.tolist() == [1.5, 10.0]
    row = small.to_row(large)
    assert row["cost_share"] == 0.15
    assert row["gain"] == pytest.approx(-0.75 / 4)
    low, high = row["gain_interval"]
    assert low < row["gain"] < high


def test_chance_and_the_best_coin() -> None:
    """A third candidate that is worse than a coin between the others is left alone."""
    assert (TABLE.random().accuracy, TABLE.random().cost) == ((1.5 + 2.25) / 8, 11.5 / 2)
    coin = TABLE.coin(3.2)  # a fifth of the way from 1.5 to 10
    assert coin.shares == pytest.approx({"small": 0.8, "large": 0.2})
    assert coin.accuracy == pytest.approx(1.5 / 4 + 0.2 * 0.75 / 4)
    assert coin.cost == pytest.approx(3.2)
    three = Table(("small", "poor", "large"), np.array([[0.0, 0.1, 1.0]]), np.array([[1.0, 2.0, 3.0]]))
    assert three.coin(2.0).shares == {"small": 0.5, "large": 0.5}
    assert (three.coin(0.0).shares, three.coin(9.0).shares) == ({"small": 1.0}, {"large": 1.0})


def test_the_margin_buys_cheapness() -> None:
    success, costs = np.array([[0.6, 0.9], [0.85, 0.9], [0.9, 0.2]]), np.array([1.0, 5.0])
    assert choose(success, costs, 0.0).tolist() == [1, 1, 0]
    assert choose(success, costs, 0.1).tolist() == [1, 0, 0]
    assert choose(success, costs, 1.0).tolist() == [0, 0, 0]


def test_every_candidate_answers_every_prompt() -> None:
    with pytest.raises(UserError, match="trial 1 lacks a candidate"):
        Table.of([trial((1, 1), (1, 1)), trial((1, 1))], ("small", "large"))
    with pytest.raises(UserError, match="no trials"):
        Table.of([], ("small",))


def test_a_row_reads_what_it_writes() -> None:
    assert [Trial.from_row(row.to_row()) for row in ROWS] == ROWS
