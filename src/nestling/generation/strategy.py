"""The contract of a decoding strategy: which token goes to which parent, for all requests that chose it, in one call.

A strategy works on R rows per request. After each model step it sees the logits of every row and answers two tensors
[G, R] (G requests): row r becomes a copy of row `parents[g, r]` with `tokens[g, r]` appended. So sampling is R = 1; beam
search picks the R best of R·V continuations; a look-ahead search puts its candidates into the rows and commits by choosing
parents. The engine moves cache rows, ends rows at stop tokens and limits, and goes on until all rows of a request ended.

A new strategy is one new file in generation/strategies with a class `Strategy(Decoding)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestling.core.config import Config, parse
from nestling.generation import filters
from nestling.generation.sequence import Row, Running

KEEP = -1
"""Token of a row that has ended and stays as it is."""
DROP = -2
"""Token of a row that holds nothing worth following."""


class View:
    """What a strategy sees of its G requests with R rows each, at one step. All tensors are on the model's device.

    `logits` [G, R, V] are raw (float32), with tokens that may never be written at -inf; `hidden` [G, R, D] is what they
    were computed from.
    """

    def __init__(self, requests: Sequence[Running], logits: Tensor, hidden: Tensor, columns: dict[str, Tensor]) -> None:
        self.requests, self.logits, self.hidden = requests, logits, hidden
        self._columns = columns

    def column(self, name: str) -> Tensor:
        """The field `name` of every request's `Sampling`, [G]."""
        if name not in self._columns:
            values = [getattr(running.request.sampling, name) for running in self.requests]
            self._columns[name] = torch.tensor(values, device=self.logits.device)
        return self._columns[name]

    @cached_property
    def scores(self) -> Tensor:
        """[G, R] summed log-probability of each row's sampled tokens; -inf for a dropped row."""
        return self._tensor([[row.score for row in running.rows] for running in self.requests])

    @cached_property
    def ended(self) -> Tensor:
        """[G, R] whether the row has ended."""
        return self._tensor([[row.finish is not None for row in running.rows] for running in self.requests])

    @cached_property
    def lengths(self) -> Tensor:
        """[G, R] sampled tokens of each row."""
        return self._tensor([[row.count for row in running.rows] for running in self.requests])

    @property
    def memories(self) -> list[Any]:
        """[G] what `begin` returned for each request; a strategy may change it."""
        return [running.memory for running in self.requests]

    def uniforms(self) -> Tensor:
        """[G] the next uniform number of each request's own stream, float64 on the host."""
        return torch.tensor([running.noise.uniform() for running in self.requests], dtype=torch.float64)

    def gumbels(self, *shape: int) -> Tensor:
        """[G, *shape] Gumbel noise from each request's own stream."""
        return torch.stack([running.noise.gumbel(*shape) for running in self.requests]).to(self.logits.device)

    def penalised(self) -> Tensor:
        """`logits` after the requests' repetition penalties; prompt and generated tokens count as seen."""
        if all(running.request.sampling.repetition_penalty == 1 for running in self.requests):
            return self.logits
        seen = torch.zeros_like(self.logits, dtype=torch.bool)
        for g, running in enumerate(self.requests):
            if running.request.sampling.repetition_penalty != 1:
                for r, row in enumerate(running.rows):
                    seen[g, r, torch.tensor([*running.prompt, *row.ids], device=seen.device)] = True
        rows = self.logits.shape[1]
        penalty = self.column("repetition_penalty").repeat_interleave(rows)
        return filters.repetition_penalty(self.logits.flatten(0, 1), penalty, seen.flatten(0, 1)).view_as(self.logits)

    def _tensor(self, values: list[list[Any]]) -> Tensor:
        return torch.tensor(values, device=self.logits.device)


class Decoding(ABC):
    """Base of the strategies. One object serves every request with the same strategy and options."""

    Settings: ClassVar[type[Config]] = Config
    """The options of this strategy, one sentence under each field."""
    SAMPLES: ClassVar[bool] = False
    """Whether another seed may give another result."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Validate the options.

        Raises:
            UserError: an option that the strategy does not have, or a bad value.
        """
        self.settings: Any = parse(self.Settings, options, "sampling.options")

    @property
    def rows(self) -> int:
        """R, the cache rows that one request takes."""
        return 1

    def begin(self, prompt_hidden: Tensor) -> Any:
        """Called once per request with the model's outputs [T, D] at the prompt (its last token excluded).

        Returns what the strategy wants to remember for the request (`View.memories`).
        """
        return None

    @abstractmethod
    def advance(self, view: View) -> tuple[Tensor, Tensor]:
        """(parents, tokens), both [G, R] long; a token is an id, `KEEP` for an ended parent, or `DROP`."""

    def best(self, rows: Sequence[Row]) -> int:
        """Which of a finished request's rows is the result: the likeliest, unless overridden."""
        return max(range(len(rows)), key=lambda r: rows[r].score)
