"""Ratings from games between models: Bradley and Terry (1952), by maximum likelihood, with intervals.

P(i beats j) = sigmoid(θ_i − θ_j); a tie is half a win of each. To keep the ratings finite where a model has won or lost
everything, or met nobody of a group, each one also drew `prior` games with an imaginary average player (θ = 0); with
prior = 0 this is the plain maximum likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CENTRE = 1000.0
SCALE = 400 / math.log(10)
"""Ratings are shown as Elo's: 400 points are odds of ten to one."""
_STEPS, _CLOSE = 100, 1e-12


@dataclass(frozen=True)
class Game:
    """`points` for the first of two different players: 1 won, 0.5 tied, 0 lost. ``Game("ppo", "sft", 1.0)``."""

    first: str
    second: str
    points: float


@dataclass(frozen=True)
class Standing:
    """How strong a model is.

    ``Standing(model="ppo", rating=1061.2, low=1010.4, high=1112.0, games=80, wins=44, ties=10, losses=26)``
    """

    model: str
    rating: float
    low: float
    high: float
    games: int
    wins: int
    ties: int
    losses: int


def standings(games: Sequence[Game], *, confidence: float = 0.95, prior: float = 1.0) -> list[Standing]:
    """The table of everybody who played, the strongest first; empty without games.

    The interval is of the distance from the average of the table: the inverse of the likelihood's Hessian at its
    maximum, taken along the directions that leave that average where it is.
    """
    players = sorted({name for game in games for name in (game.first, game.second)})
    points = _points(games, players)
    strengths = fit(points, prior)
    errors = _standard_errors(points, strengths, prior)
    strengths = strengths - strengths.mean() if players else strengths
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rows = []
    for player, strength, error in zip(players, strengths, errors, strict=True):
        rating, half = CENTRE + SCALE * strength, SCALE * z * error
        rows.append(Standing(player, rating, rating - half, rating + half, **_record(games, player)))
    return sorted(rows, key=lambda row: -row.rating)


def fit(points: np.ndarray, prior: float = 0.0) -> np.ndarray:
    """Strengths θ [N] of the highest likelihood, by Newton's method; their mean is 0 where there is no prior.

    Args:
        points: [N, N], what the row's player won against the column's.
        prior: games that each player drew with the average one.

    Raises:
        ValueError: without a prior, some players have won (or lost) every game with the rest, so that no maximum exists.
    """
    if not prior and not _connected(points):
        raise ValueError("the likelihood has no maximum: some players won every game with the rest")
    strengths = np.zeros(len(points))
    played = points + points.T
    for _ in range(_STEPS):
        expected = played * _sigmoid(strengths[:, None] - strengths[None, :])
        gradient = points.sum(1) - expected.sum(1) + prior * (0.5 - _sigmoid(strengths))
        step = np.linalg.lstsq(_hessian(played, strengths, prior), gradient, rcond=None)[0]
        strengths = strengths + np.clip(step, -1, 1)  # a bounded step cannot leap over the maximum and run away
        if np.abs(step).max(initial=0.0) < _CLOSE * max(1.0, np.abs(strengths).max(initial=0.0)):
            return strengths
    raise ValueError(f"no maximum found in {_STEPS} steps")


def _connected(points: np.ndarray) -> bool:
    """Ford's (1957) condition: everybody has, by way of others, won something against everybody."""
    reached = np.linalg.matrix_power((points > 0) | np.eye(len(points), dtype=bool), max(1, len(points)))
    return bool(reached.all())


def _points(games: Sequence[Game], players: Sequence[str]) -> np.ndarray:
    place = {player: number for number, player in enumerate(players)}
    points = np.zeros((len(players), len(players)))
    for game in games:
        points[place[game.first], place[game.second]] += game.points
        points[place[game.second], place[game.first]] += 1 - game.points
    return points


def _hessian(played: np.ndarray, strengths: np.ndarray, prior: float) -> np.ndarray:
    """Minus the second derivatives of the log-likelihood, [N, N]."""
    chance = _sigmoid(strengths[:, None] - strengths[None, :])
    information = played * chance * (1 - chance)
    alone = _sigmoid(strengths)
    return np.diag(information.sum(1) + prior * alone * (1 - alone)) - information


def _standard_errors(points: np.ndarray, strengths: np.ndarray, prior: float) -> np.ndarray:
    """[N], of each strength less the mean of all."""
    inverse = np.linalg.pinv(_hessian(points + points.T, strengths, prior))
    centring = np.eye(len(strengths)) - 1 / max(1, len(strengths))
    return np.sqrt(np.diag(centring @ inverse @ centring))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _record(games: Sequence[Game], player: str) -> dict[str, int]:
    own = [game.points for game in games if game.first == player]
    own += [1 - game.points for game in games if game.second == player]
    wins, ties = sum(points > 0.5 for points in own), own.count(0.5)
    return {"games": len(own), "wins": wins, "ties": ties, "losses": len(own) - wins - ties}
