"""The contract of a decoding strategy: which token goes to which parent, for all requests that chose it, in one call.

A strategy works on R rows per request. After each model step it sees the logits of every row and answers two tensors
[G, R] (G requests): row r becomes a copy of row `parents[g, r]` with `tokens[g, r]` appended. So sampling is R = 1; beam
search picks the R best of R·V continuations; a look-ahead search puts its candidates into the rows and commits by choosing
parents. The engine moves cache rows, ends rows at stop tokens and limits, and goes on until all rows of a request ended.

A new strategy is one new file in generation/strategies with a class `Strategy(Decoding)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import compress
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestling.core.config import Config, parse
from nestling.generation import filters
from nestling.generation.constraints import unpack
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Row, Running

KEEP = -1
"""Token of a row that has ended and stays as it is."""
DROP = -2
"""Token of a row that holds nothing worth following."""
NEUTRAL = Sampling()
"""Asks for nothing that would change a distribution."""
MOVING = ("repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias")
"""What moves logits before they are shaped."""


class Parameters:
    """What G requests ask for, read once: the fields (and properties) of their `Sampling`.

    `own` [G, R] are the parents where every row goes on by itself.
    """

    def __init__(self, requests: Sequence[Running], device: torch.device) -> None:
        self.requests, self._device = requests, device
        self._values: dict[str, list[Any]] = {}
        self._columns: dict[str, Tensor] = {}
        self.own = torch.arange(requests[0].width, device=device).expand(len(requests), -1)
        self._asked: dict[tuple[str, ...], bool] = {}

    def values(self, name: str) -> list[Any]:
        """[G] the field `name` of every request."""
        if name not in self._values:
            self._values[name] = [getattr(running.sampling, name) for running in self.requests]
        return self._values[name]

    def column(self, name: str) -> Tensor:
        """The same as a tensor [G]."""
        if name not in self._columns:
            self._columns[name] = torch.tensor(self.values(name), device=self._device)
        return self._columns[name]

    def asked(self, *names: str) -> bool:
        """Whether a request gives one of these fields a value that changes something."""
        if names not in self._asked:
            self._asked[names] = any(value != getattr(NEUTRAL, name) for name in names for value in self.values(name))
        return self._asked[names]

    def bias(self, vocabulary: int) -> Tensor:
        """[G, V] what the requests add to logits."""
        if "logit_bias" not in self._columns:
            bias = torch.zeros(len(self.requests), vocabulary)
            for g, added in enumerate(self.values("logit_bias")):
                for token, value in added.items():
                    bias[g, token] = value
            self._columns["logit_bias"] = bias.to(self._device)
        return self._columns["logit_bias"]


class View:
    """What a strategy sees of its G requests with R rows each, at one step. All tensors are on the model's device.

    There are two levels of logits [G, R, V], float32: `penalised` are the model's with the requests' penalties and bias, and
    -inf for what may not be written; `shaped` is the distribution that the request wants to be sampled from.
    """

    def __init__(self, parameters: Parameters, logits: Tensor, hidden: Callable[[], Tensor]) -> None:
        self.parameters, self.requests, self.own = parameters, parameters.requests, parameters.own
        self._raw, self._hidden = logits, hidden

    @cached_property
    def hidden(self) -> Tensor:
        """[G, R, D] what the logits were computed from."""
        return self._hidden()

    @cached_property
    def penalised(self) -> Tensor:
        """[G, R, V] what moves logits applied, and -inf where a token may not be written: never, not yet, by a constraint."""
        logits = self._moved() if self.parameters.asked(*MOVING) else self._raw
        return self._forbid(logits) if self.parameters.asked("min_tokens", "constraint") else logits

    @cached_property
    def shaped(self) -> Tensor:
        """[G, R, V] `penalised` after temperature and the filters that at least one request asks for."""
        logits = self.penalised.flatten(0, 1)
        for name, rung in filters.LADDER.items():
            if self.parameters.asked(name):
                logits = rung(logits, self._per_row(name))
        return logits.view_as(self._raw)

    @cached_property
    def logprobs(self) -> Tensor:
        """[G, R, V] what each token adds to a row's score, moved by penalties and bias; -inf where not allowed.

        Without them it is what the engine returns: log softmax(model's logits / scoring temperature). What a constraint
        forbids does not make the rest likelier, so rows under different constraints stay comparable.
        """
        temperature = self.parameters.column("scoring_temperature").view(-1, 1, 1)
        return self.penalised / temperature - (self._raw / temperature).logsumexp(2, keepdim=True)

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
        return torch.stack([running.noise.gumbel(*shape) for running in self.requests]).to(self._raw.device)

    def _moved(self) -> Tensor:
        """[G, R, V] the model's logits after penalties and bias.

        The repetition penalty sees prompt and continuation; frequency and presence count what was sampled, so that a
        tool's result can be repeated freely.
        """
        logits, asked = self._raw.flatten(0, 1), self.parameters.asked
        if asked("repetition_penalty"):
            seen = self._counts([[*running.prompt, *row.ids] for running in self.requests for row in running.rows]) > 0
            logits = filters.repetition_penalty(logits, self._per_row("repetition_penalty"), seen)
        if asked("frequency_penalty") or asked("presence_penalty"):
            counts = self._counts([list(compress(row.ids, row.sampled)) for row in self._rows])
            frequency, presence = self._per_row("frequency_penalty"), self._per_row("presence_penalty")
            logits = filters.count_penalties(logits, frequency, presence, counts)
        if asked("logit_bias"):
            bias = self.parameters.bias(self._raw.shape[2])
            logits = logits + bias.repeat_interleave(self._raw.shape[1], dim=0)
        return logits.view_as(self._raw)

    def _per_row(self, name: str) -> Tensor:
        """The field `name` for each of all G · R rows."""
        return self.parameters.column(name).repeat_interleave(self._raw.shape[1], dim=0)

    def _counts(self, texts: list[list[int]]) -> Tensor:
        """[G · R, V] how often each row's text has each token."""
        vocabulary = self._raw.shape[2]
        places = [vocabulary * place + token for place, text in enumerate(texts) for token in text]
        flat = torch.tensor(places, dtype=torch.long, device=self._raw.device)
        return flat.bincount(minlength=len(texts) * vocabulary).view(len(texts), vocabulary)

    @property
    def _rows(self) -> list[Row]:
        return [row for running in self.requests for row in running.rows]

    def _forbid(self, logits: Tensor) -> Tensor:
        """[G, R, V] with -inf for stop tokens before `min_tokens` and for what constraints forbid."""
        early = [
            (place, token)
            for place, (running, row) in enumerate((running, row) for running in self.requests for row in running.rows)
            if row.count < running.sampling.min_tokens
            for token in running.stop_ids
        ]
        guided = {place: row.guide.allowed for place, row in enumerate(self._rows) if row.guide and row.guide.allowed}
        if not early and not guided:
            return logits
        forbidden = torch.zeros_like(self._raw, dtype=torch.bool).flatten(0, 1)
        if guided:
            places = torch.tensor(list(guided), device=forbidden.device)
            forbidden[places] = ~unpack(list(guided.values()), forbidden.shape[1]).to(forbidden.device)
        if early:
            rows, tokens = torch.tensor(early, device=forbidden.device).T
            forbidden[rows, tokens] = True
        return logits.masked_fill(forbidden.view_as(logits), -torch.inf)

    def _tensor(self, values: list[list[Any]]) -> Tensor:
        return torch.tensor(values, device=self._raw.device)


class Decoding(ABC):
    """Base of the strategies. One object serves every request with the same strategy and options."""

    Settings: ClassVar[type[Config]] = Config
    """The options of this strategy, one sentence under each field."""
    SAMPLES: ClassVar[bool] = False
    """Whether another seed may give another result."""
    READS_PROMPT: ClassVar[bool] = False
    """Whether `begin` needs the outputs at every prompt token, also at those that a shared prefix has in the cache."""

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

    def check(self, sampling: Sampling, vocabulary: int) -> None:
        """Called when a request is submitted; a strategy that can't serve it refuses.

        Raises:
            UserError: what is asked for is out of this strategy's reach.
        """
        return None

    @abstractmethod
    def advance(self, view: View) -> tuple[Tensor, Tensor]:
        """(parents, tokens), both [G, R] long; a token is an id, `KEEP` for an ended parent, or `DROP`."""

    def order(self, rows: Sequence[Row]) -> list[int]:
        """The rows of a finished request that are results, best first: all, the likeliest first, unless overridden."""
        return sorted(range(len(rows)), key=lambda r: -rows[r].score)
