"""Requests that share a strategy, and what is reported of the tokens that it chose for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.generation.sequence import Alternatives, Running
from nestling.generation.speculation import Proposal
from nestling.generation.strategy import Decoding, Parameters


class Group:
    """Requests that share a strategy, where their rows are, and their parameters."""

    def __init__(
        self, strategy: Decoding, running: list[Running], device: torch.device, proposals: Sequence[Proposal] = ()
    ) -> None:
        self.strategy, self.running, self.proposals = strategy, running, proposals
        self.parameters = Parameters(running, device)
        slots = [row.slot for one in running for row in one.rows]
        in_order = slots == list(range(len(slots)))  # the first rows: nothing needs to be copied
        self._rows = slice(len(slots)) if in_order else torch.tensor(slots, device=device)

    def pick(self, values: Tensor, place: int) -> Tensor:
        """[N, T, ·] of all rows -> [G, R, ·] of this group's at one place."""
        return values[self._rows, place].view(len(self.running), self.strategy.rows, -1)


def measure(raw: Tensor, parameters: Parameters) -> Tensor:
    """log softmax(raw / temperature), [G, R, V]: before penalties, filters and banned tokens."""
    if parameters.asked("scoring_temperature"):
        raw = raw / parameters.column("scoring_temperature").view(-1, 1, 1)
    return raw.log_softmax(2)


def chosen(measured: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
    """What was measured of the chosen tokens, [G, R]."""
    if measured.shape[1] == 1:
        return measured[:, 0].gather(1, tokens)
    return measured.flatten(1).gather(1, parents * measured.shape[2] + tokens.clamp_min(0))


def alternatives(measured: Tensor, parameters: Parameters, parents: Tensor) -> list[list[Alternatives]]:
    """[G, R] the likeliest tokens of each row's parent, as many as its request asks for."""
    if not parameters.asked("top_logprobs"):
        return [[()] * parents.shape[1]] * parents.shape[0]
    wanted = parameters.values("top_logprobs")
    best = measured.topk(min(max(wanted), measured.shape[2]), dim=2)
    found: list[list[Alternatives]] = []
    rows = zip(wanted, parents.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    for count, origin, ids, values in rows:
        pairs = [tuple(zip(i[:count], v[:count], strict=True)) for i, v in zip(ids, values, strict=True)]
        found.append([pairs[parent] for parent in origin])
    return found
