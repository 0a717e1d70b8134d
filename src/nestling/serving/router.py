"""Model "auto": picks model and effort for each request, in microseconds and in this process.

One logistic regression per candidate predicts from the words of the prompt whether its answer will be right; the
cheapest candidate whose chance lies within a margin of the best one's is taken. It learns from trials, in which every
candidate answered every prompt (`stages/trials.py`).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from nestling.core.errors import UserError
from nestling.core.storage import atomic_folder, read_json, write_json
from nestling.core.types import Message
from nestling.evaluation.routing import Candidate, Effort, Table, choose

WEIGHTS, SETTINGS = "router.safetensors", "router.json"
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
        """The router of a folder that `nestling router` wrote.

        Raises:
            UserError: there is none.
        """
        folder = Path(folder)
        if not (folder / SETTINGS).exists() and (folder / "router" / SETTINGS).exists():
            folder = folder / "router"
        if not (folder / SETTINGS).exists():
            raise UserError("no router here", where=folder, fix="name the folder that `nestling router` wrote")
        row = read_json(folder / SETTINGS)
        candidates = {name: Candidate(**settings) for name, settings in row["candidates"].items()}
        return cls(candidates, load_file(folder / WEIGHTS)["weights"], row["costs"], row["margin"])

    def save(self, folder: str | Path) -> None:
        """Write the folder, whole or not at all."""
        with atomic_folder(Path(folder)) as place:
            save_file({"weights": np.ascontiguousarray(self.weights)}, place / WEIGHTS)
            candidates = {name: candidate.model_dump() for name, candidate in self.candidates.items()}
            write_json(place / SETTINGS, {"candidates": candidates, "costs": self.costs.tolist(), "margin": self.margin})

    def success(self, prompts: Sequence[Sequence[Message]]) -> NDArray[np.float64]:
        """The predicted chance of each candidate on each prompt, [N, C]."""
        logits = features(prompts, len(self.weights) - 1) @ self.weights
        return 1 / (1 + np.exp(-logits.astype(np.float64)))

    def choose(self, messages: Sequence[Message], served: Sequence[str] | None = None) -> Choice:
        """Who should answer a conversation. `served` restricts the choice to models that are there.

        Raises:
            UserError: none of the candidates' models is served.
        """
        names = list(self.candidates)
        open_ = [n for n, name in enumerate(names) if served is None or self.candidates[name].model in served]
        if not open_:
            raise UserError("none of the router's models is served", where="auto", value=list(served or ()))
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


def fit(
    prompts: Sequence[Sequence[Message]], table: Table, candidates: Mapping[str, Candidate], *,
    margin: float, size: int = 4096, penalty: float = 1e-4,
) -> Router:  # fmt: skip
    """Logistic regressions on the trials' scores, which may lie between 0 and 1, with an L2 penalty (the constant free)."""
    inputs = torch.from_numpy(features(prompts, size))
    targets = torch.from_numpy(table.scores).float()
    weights = torch.zeros(size + 1, len(table.names), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        error = F.binary_cross_entropy_with_logits(inputs @ weights, targets, reduction="sum") / len(inputs)
        loss = error + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return Router(candidates, weights.detach().numpy(), table.mean_costs.tolist(), margin)
