"""Model "auto": picks model and effort for each request, in microseconds and in this process.

One logistic regression per candidate predicts from the words of the prompt whether its answer will be right; the
cheapest candidate whose chance lies within a margin of the best one's is taken. It learns from trials, in which every
candidate answered every prompt (`stages/trials.py`). What regressions that did not see a prompt say of it makes the
predictions calibrated and chooses the margin.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from safetensors.numpy import load_file, save_file

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.core.storage import atomic_folder, read_json, write_json
from nestling.core.types import Message
from nestling.evaluation.routing import Candidate, Effort, Table, choose
from nestling.model.locate import places

WEIGHTS, SETTINGS = "router.safetensors", "router.json"
MARGINS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Those that are tried."""
_WORD = re.compile(r"\d|[^\W\d]+|[^\w\s]")


@dataclass(frozen=True)
class Choice:
    """Who answers, and how: ``Choice(model="small", effort="tools", name="small with tools", success=0.97)``.

    direct: no tools and no thought; tools: the server's tools are on offer; thinking: a thought comes first.
    """

    model: str
    effort: Effort
    name: str
    success: float
    """The predicted chance of a right answer."""


class Router:
    """Weights of the candidates' regressions, and what is needed to choose.

    Args:
        candidates: by name, in the order of the columns.
        weights: [F + 1, C] float32 over hashed features and, last, a constant.
        costs: mean cost of each candidate, [C].
        margin: how much predicted success may be given up for a cheaper candidate.
    """

    def __init__(
        self, candidates: Mapping[str, Candidate], weights: NDArray[np.float32], costs: Sequence[float], margin: float
    ) -> None:
        self.candidates, self.weights, self.margin = dict(candidates), weights, margin
        self.costs = np.asarray(costs, dtype=np.float64)

    @classmethod
    def load(cls, folder: str | Path) -> Router:
        """The router of a folder that `nestling router` wrote, or of a run that has one.

        Raises:
            UserError: there is none.
        """
        place = next((place for place in places(folder) if (place / SETTINGS).exists()), None)
        if place is None:
            raise UserError("no router here", where=folder, fix="name the folder that `nestling router` wrote")
        row = read_json(place / SETTINGS)
        candidates = {name: Candidate(**settings) for name, settings in row["candidates"].items()}
        return cls(candidates, load_file(place / WEIGHTS)["weights"], row["costs"], row["margin"])

    def save(self, folder: str | Path) -> None:
        """Write the folder, whole or not at all."""
        with atomic_folder(Path(folder)) as place:
            save_file({"weights": np.ascontiguousarray(self.weights)}, place / WEIGHTS)
            candidates = {name: candidate.model_dump() for name, candidate in self.candidates.items()}
            write_json(
                place / SETTINGS, {"candidates": candidates, "costs": self.costs.tolist(), "margin": self.margin}
            )

    def success(self, prompts: Sequence[Sequence[Message]]) -> NDArray[np.float64]:
        """The predicted chance of each candidate on each prompt, [N, C]."""
        logits = features(prompts, len(self.weights) - 1) @ self.weights
        return _sigmoid(logits.astype(np.float64))

    def choose(self, messages: Sequence[Message], served: Sequence[str] | None = None, *, tools: bool = True) -> Choice:
        """Who should answer a conversation. `served` restricts the choice to models that are there.

        Args:
            tools: whether any are on offer; without them effort tools is chosen only where there is no other.

        Raises:
            UserError: none of the candidates' models is served.
        """
        names = list(self.candidates)
        open_ = [n for n, name in enumerate(names) if served is None or self.candidates[name].model in served]
        if not open_:
            raise UserError("none of the router's models is served", where="auto", value=list(served or ()))
        if not tools:
            open_ = [n for n in open_ if self.candidates[names[n]].effort != "tools"] or open_
        success = self.success([messages])[:, open_]
        taken = open_[int(choose(success, self.costs[open_], self.margin)[0])]
        candidate = self.candidates[names[taken]]
        return Choice(candidate.model, candidate.effort, names[taken], float(success[0, open_.index(taken)]))


def features(prompts: Sequence[Sequence[Message]], size: int) -> NDArray[np.float32]:
    """Hashed words and pairs of words of each prompt, [N, size + 1], each row of length one and then a constant 1."""
    table = np.zeros((len(prompts), size + 1), dtype=np.float32)
    for row, messages in enumerate(prompts):
        for word in _words(messages):
            table[row, zlib.crc32(word.encode()) % size] += 1
    table[:, :-1] = np.log1p(table[:, :-1])
    table[:, :-1] /= np.maximum(np.linalg.norm(table[:, :-1], axis=1, keepdims=True), 1e-6)
    table[:, -1] = 1
    return table


def _words(messages: Sequence[Message]) -> Iterator[str]:
    """Words and pairs of the last user turn; of what came before only its words, marked by their role.

    Every digit reads as 0: it matters that there is a number, and how long it is, not which.
    """
    asked = max((n for n, message in enumerate(messages) if message.role == "user"), default=-1)
    for place, message in enumerate(messages):
        words = ["0" if word.isdigit() else word.lower() for word in _WORD.findall(message.content)]
        if place == asked:
            yield from words
            yield from map(" ".join, zip(["^", *words], [*words, "$"], strict=True))
        elif place < asked:
            yield from (f"{message.role}:{word}" for word in words)


class Learning(Config):
    """How a router learns, and how much success it may give up for a cheaper answer."""

    margin: float | None = Field(
        None, ge=0, le=1, description="Predicted success given up for a cheaper candidate; none: chosen by `loss`."
    )
    loss: float = Field(
        0.01, ge=0, le=1, description="Accuracy that the margin may cost against the best candidate for every prompt."
    )
    features: int = Field(4096, ge=16, description="Buckets that words and pairs of words are hashed into.")
    penalty: float = Field(1e-4, ge=0, description="L2 penalty of the regressions.")
    folds: int = Field(5, ge=2, description="Parts of the trials, each predicted by regressions on the others.")


def fit(
    prompts: Sequence[Sequence[Message]], table: Table, candidates: Mapping[str, Candidate], settings: Learning
) -> Router:
    """A router that has learnt from trials, with calibrated predictions and its margin."""
    inputs = features(prompts, settings.features)
    fold = np.arange(len(inputs)) % settings.folds
    unseen = np.zeros(table.scores.shape)
    for number in range(settings.folds):
        mine = fold == number
        unseen[mine] = inputs[mine] @ regress(inputs[~mine], table.scores[~mine], settings.penalty)
    scale, shift = _calibration(unseen, table.scores)
    weights = regress(inputs, table.scores, settings.penalty) * scale
    weights[-1] += shift
    margin = settings.margin
    if margin is None:
        margin = _margin(_sigmoid(unseen * scale + shift), table, settings.loss)
    return Router(candidates, weights.astype(np.float32), table.mean_costs.tolist(), margin)


def regress(inputs: NDArray[Any], targets: NDArray[Any], penalty: float) -> NDArray[np.float64]:
    """Weights [F, C] of logistic regressions on inputs [N, F], the last of which is a constant that has no L2 penalty.

    Targets [N, C] may lie between 0 and 1.
    """
    given, wanted = torch.from_numpy(inputs).float(), torch.from_numpy(targets).float()
    weights = torch.zeros(given.shape[1], wanted.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        error = F.binary_cross_entropy_with_logits(given @ weights, wanted, reduction="sum") / len(given)
        loss = error + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return weights.detach().double().numpy()


def _calibration(logits: NDArray[np.float64], scores: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(scale, shift), [C] each, that make sigmoid(scale · logit + shift) a probability (Platt 1999).

    The targets keep as far from 0 and 1 as one more right and one more wrong answer would move them.
    """
    targets = (scores * len(scores) + 1) / (len(scores) + 2)
    pairs = [np.stack([column, np.ones(len(column))], axis=1) for column in logits.T]
    found = [regress(pair, targets[:, [place]], 0.0)[:, 0] for place, pair in enumerate(pairs)]
    scale, shift = np.array(found).T
    return np.maximum(scale, 0.0), shift


def _margin(success: NDArray[np.float64], table: Table, loss: float) -> float:
    """The margin that makes the cheapest choices out of those that cost no more than this accuracy; 0 where all do."""
    wanted = max(table.replay(table.always(name)).accuracy for name in table.names) - loss
    tried = {margin: table.replay(choose(success, table.mean_costs, margin)) for margin in MARGINS}
    allowed = [margin for margin, policy in tried.items() if policy.accuracy >= wanted]
    return min(allowed, key=lambda margin: tried[margin].cost, default=0.0)


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-logits))
