"""Bradley and Terry's ratings against other ways to the same numbers."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from nestling.evaluation.arena import CENTRE, SCALE, Game, fit, standings


def games_between(strengths: dict[str, float], count: int, seed: int, ties: float = 0.2) -> list[Game]:
    """Games between random pairs of players of known strength."""
    dice = random.Random(seed)
    games = []
    for _ in range(count):
        a, b = dice.sample(sorted(strengths), 2)
        chance = 1 / (1 + math.exp(strengths[b] - strengths[a]))
        points = 0.5 if dice.random() < ties else float(dice.random() < chance)
        games.append(Game(a, b, points))
    return games


def by_minorisation(points: np.ndarray) -> np.ndarray:
    """Maximum likelihood by Hunter's (2004) MM iteration p_i <- W_i / sum_j n_ij / (p_i + p_j), in logarithms."""
    worth = np.ones(len(points))
    played = points + points.T
    for _ in range(20_000):
        worth = points.sum(1) / (played / (worth[:, None] + worth[None, :])).sum(1)
        worth /= np.exp(np.log(worth).mean())
    return np.log(worth)


def test_two_players_have_the_closed_form():
    """75 points of 100 are log-odds of log 3, its standard error 1 / sqrt(n p (1 - p))."""
    games = [Game("a", "b", 1.0)] * 70 + [Game("b", "a", 0.5)] * 10 + [Game("b", "a", 1.0)] * 20
    strong, weak = standings(games, prior=0)
    assert (strong.model, weak.model) == ("a", "b")
    assert strong.rating - weak.rating == pytest.approx(SCALE * math.log(3))
    assert strong.rating + weak.rating == pytest.approx(2 * CENTRE)
    half = 1.959964 * SCALE / math.sqrt(100 * 0.75 * 0.25) / 2  # of the distance from the average: half the difference
    assert strong.high - strong.rating == pytest.approx(half, rel=1e-6)
    assert (strong.games, strong.wins, strong.ties, strong.losses) == (100, 70, 10, 20)
    assert (weak.games, weak.wins, weak.ties, weak.losses) == (100, 20, 10, 70)


def test_many_players_have_the_maximum_that_another_method_finds():
    points = np.random.default_rng(1).integers(1, 30, (6, 6)).astype(float)
    np.fill_diagonal(points, 0)
    strengths = fit(points)
    assert strengths == pytest.approx(by_minorisation(points), abs=1e-8)
    assert strengths.mean() == pytest.approx(0, abs=1e-9)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """95 % intervals over 200 seasons of 5 players: 0.95 within three standard errors of the count."""
    truth = {"a": -0.8, "b": -0.3, "c": 0.0, "d": 0.4, "e": 0.7}
    held = total = 0
    for season in range(200):
        for row in standings(games_between(truth, 400, season, ties=0.0), prior=0):
            held += row.low <= CENTRE + SCALE * truth[row.model] <= row.high
            total += 1
    assert abs(held / total - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 200)


def test_who_won_everything_stays_finite_and_uncertain():
    first, last = standings([Game("a", "b", 1.0)] * 3)
    assert first.model == "a"
    assert first.rating > last.rating
    assert first.low < last.high
    with pytest.raises(ValueError, match="no maximum"):
        standings([Game("a", "b", 1.0)] * 3, prior=0)


def test_groups_that_never_met_are_both_in_the_table():
    table = standings([Game("a", "b", 1.0), Game("a", "b", 0.0), Game("c", "d", 1.0)])
    assert {row.model for row in table} == {"a", "b", "c", "d"}
    assert all(math.isfinite(row.low) and math.isfinite(row.high) for row in table)


def test_only_ties_and_no_games():
    assert standings([]) == []
    assert [row.rating for row in standings([Game("a", "b", 0.5)] * 4)] == pytest.approx([CENTRE, CENTRE])
