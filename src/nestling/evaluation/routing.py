"""What choosing a model for each request gains: accuracy against cost of any policy, from what every candidate scored.

An outcome row holds a prompt and, for each candidate, how good its answer was (in [0, 1]) and what it cost; where each
prompt was answered by all candidates, any way of choosing among them can be replayed exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.core.intervals import Interval, bootstrap
from nestling.core.types import Message, Row

Effort = Literal["direct", "tools", "thinking"]
"""Answer at once, with tools on offer, or after a thought."""


class Candidate(Config):
    """One way of answering."""

    model: str = Field(description="The name that the model is served under (in trials: the input that it comes from).")
    effort: Effort = Field("direct", description="direct, tools or thinking.")


class Outcome(Row):
    """How one candidate answered one prompt: the score in [0, 1], and the cost in tokens × parameters."""

    score: float = Field(ge=0, le=1)
    cost: float = Field(ge=0)


class Trial(Row):
    """One prompt and what every candidate made of it.

    >>> row = {"prompt": [{"role": "user", "content": "2 + 3?"}], "outcomes": {"small": {"score": 1, "cost": 3e7}}}
    >>> Trial.from_row(row).outcomes["small"].score
    1.0
    """

    prompt: tuple[Message, ...]
    outcomes: dict[str, Outcome]
    meta: dict[str, Any] = {}

    def to_row(self) -> dict[str, Any]:
        """The JSON object."""
        outcomes = {name: outcome.model_dump() for name, outcome in self.outcomes.items()}
        row = {"prompt": [message.to_row() for message in self.prompt], "outcomes": outcomes}
        return row | ({"meta": self.meta} if self.meta else {})


@dataclass(frozen=True)
class Table:
    """Outcomes as numbers: N prompts by C candidates."""

    names: tuple[str, ...]
    scores: NDArray[np.float64]
    """[N, C]"""
    costs: NDArray[np.float64]
    """[N, C]"""

    @classmethod
    def of(cls, rows: Sequence[Trial], names: Sequence[str]) -> Table:
        """The rows' outcomes in the order of `names`.

        Raises:
            UserError: no row, or one that lacks a candidate.
        """
        if not rows:
            raise UserError("no trials", where="trials", fix="ask the candidates some prompts")
        for number, row in enumerate(rows):
            if missing := [name for name in names if name not in row.outcomes]:
                fix = "every prompt needs the outcome of every candidate"
                raise UserError(f"trial {number} lacks a candidate", value=missing[0], fix=fix)
        found = np.array([[(row.outcomes[n].score, row.outcomes[n].cost) for n in names] for row in rows], dtype=float)
        return cls(tuple(names), found[..., 0], found[..., 1])

    @property
    def mean_costs(self) -> NDArray[np.float64]:
        """What a candidate costs on average, [C]."""
        return self.costs.mean(axis=0)

    def oracle(self) -> NDArray[np.intp]:
        """The cheapest of the best candidates of each prompt, [N]: what no router can beat."""
        return choose(self.scores, self.costs, margin=0.0)

    def always(self, name: str) -> NDArray[np.intp]:
        """One candidate for every prompt, [N]."""
        return np.full(len(self.scores), self.names.index(name))

    def random(self) -> Policy:
        """What any candidate, drawn for each prompt, scores and costs on average."""
        share = 1 / len(self.names)
        return Policy(self.scores.mean(axis=1), self.costs.mean(axis=1), dict.fromkeys(self.names, share))

    def coin(self, cost: float) -> Policy:
        """The best that tossing a coin between two candidates gives for this cost, or for what is nearest to it."""
        costs = self.mean_costs.tolist()
        cost = min(max(cost, min(costs)), max(costs))
        pairs = [(a, b) for a, low in enumerate(costs) for b, high in enumerate(costs) if low <= cost <= high]
        mixtures = [self._mixture(a, b, (cost - costs[a]) / ((costs[b] - costs[a]) or 1.0)) for a, b in pairs]
        return max(mixtures, key=lambda policy: policy.accuracy)

    def _mixture(self, low: int, high: int, share: float) -> Policy:
        scores, costs = ((1 - share) * of[:, low] + share * of[:, high] for of in (self.scores, self.costs))
        taken = {self.names[high]: share, self.names[low]: 1 - share}
        return Policy(scores, costs, {name: part for name, part in taken.items() if part})

    def replay(self, chosen: NDArray[np.intp]) -> Policy:
        """What a choice of candidates, [N], would have scored and cost."""
        rows = np.arange(len(chosen))
        scores, costs = self.scores[rows, chosen], self.costs[rows, chosen]
        shares = np.bincount(chosen, minlength=len(self.names)) / len(chosen)
        taken = {name: float(share) for name, share in zip(self.names, shares, strict=True) if share}
        return Policy(scores, costs, taken)


@dataclass(frozen=True)
class Policy:
    """A way of choosing, replayed: score and cost of each prompt, and how often each candidate was taken."""

    scores: NDArray[np.float64]
    costs: NDArray[np.float64]
    shares: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        """The mean score."""
        return float(self.scores.mean())

    @property
    def cost(self) -> float:
        """The mean cost of a prompt."""
        return float(self.costs.mean())

    def gain(self, other: Policy) -> tuple[float, Interval]:
        """How much more accurate than another policy on the same prompts; the interval resamples prompts."""
        gains = self.scores - other.scores
        return float(gains.mean()), bootstrap(gains.tolist())

    def to_row(self, dear: Policy) -> dict[str, Any]:
        """The entry of report.json, beside the dearest candidate for everything."""
        gain, interval = self.gain(dear)
        return {"accuracy": self.accuracy, "interval": list(bootstrap(self.scores.tolist())),
                "cost": self.cost, "cost_share": self.cost / dear.cost if dear.cost else 1.0,
                "gain": gain, "gain_interval": list(interval), "shares": dict(self.shares)}  # fmt: skip


def choose(success: NDArray[np.float64], costs: NDArray[np.float64], margin: float) -> NDArray[np.intp]:
    """The cheapest candidate whose predicted success lies within `margin` of the best: success [N, C], costs [C] or
    [N, C] -> [N].

    >>> choose(np.array([[0.90, 0.93], [0.20, 0.95]]), np.array([1.0, 5.0]), margin=0.05).tolist()
    [0, 1]
    """
    good = success >= success.max(axis=1, keepdims=True) - margin
    return np.where(good, costs, np.inf).argmin(axis=1)
