"""Requests that share a strategy, and what is reported of the tokens that it chose for them."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.generation.sequence import Alternatives, Running
from nestling.generation.speculation import Proposal
from nestling.generation.strategy import Decoding, View


class Group:
    """Requests that share a strategy, where their rows are, and their parameters as tensors."""

    def __init__(self, strategy: Decoding) -> None:
        self.strategy = strategy
        self.running: list[Running] = []
        self.proposals: list[Proposal] = []
        self.columns: dict[str, Tensor] = {}
        self._slots: Tensor | None = None
        self._in_order = False  # its rows are the first ones: nothing needs to be copied

    def locate(self, device: torch.device) -> None:
        """Note the cache rows of the requests, whose list is now complete."""
        slots = [row.slot for running in self.running for row in running.rows]
        self._in_order = slots == list(range(len(slots)))
        self._slots = torch.tensor(slots, device=device)

    def pick(self, values: Tensor) -> Tensor:
        """[N, ·] of all rows -> [G, R, ·] of this group's."""
        assert self._slots is not None
        shape = (len(self.running), self.strategy.rows, values.shape[1])
        return (values[: shape[0] * shape[1]] if self._in_order else values[self._slots]).view(shape)


def measure(raw: Tensor, view: View) -> Tensor:
    """log softmax(raw / temperature), [G, R, V]: before penalties, filters and banned tokens."""
    if any(running.sampling.scoring_temperature != 1 for running in view.requests):
        raw = raw / view.column("scoring_temperature").view(-1, 1, 1)
    return raw.log_softmax(2)


def chosen(measured: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
    """What was measured of the chosen tokens, [G, R]."""
    if measured.shape[1] == 1:
        return measured[:, 0].gather(1, tokens)
    return measured.flatten(1).gather(1, parents * measured.shape[2] + tokens.clamp_min(0))


def alternatives(measured: Tensor, view: View, parents: Tensor) -> list[list[Alternatives]]:
    """[G, R] the likeliest tokens of each row's parent, as many as its request asks for."""
    wanted = [running.sampling.top_logprobs for running in view.requests]
    if not any(wanted):
        return [[()] * parents.shape[1]] * parents.shape[0]
    best = measured.topk(min(max(wanted), measured.shape[2]), dim=2)
    found: list[list[Alternatives]] = []
    rows = zip(wanted, parents.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    for count, origin, ids, values in rows:
        pairs = [tuple(zip(i[:count], v[:count], strict=True)) for i, v in zip(ids, values, strict=True)]
        found.append([pairs[parent] for parent in origin])
    return found
