"""Contrastive search: likely tokens that do not repeat what was said (Su et al. 2022, eq. 5).

Of the k likeliest tokens take the one with the largest

    (1 − α) · P(v | text) − α · max over earlier tokens of cosine(h_v, h_earlier)

where h is the model's output at a token. h_v needs v to be read first: the k rows of a request hold the k candidates,
and once they were read, all rows follow the best one and hold its k likeliest continuations. So a token costs one step, as
in sampling. The last token of a text that is cut by `max_tokens` is the likeliest, as nothing is read after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from nestling.core.config import Config
from nestling.generation.sequence import Row
from nestling.generation.strategy import DROP, KEEP, Decoding, View


class Options(Config):
    """Options of contrastive search."""

    candidates: int = Field(4, ge=1, le=64, description="The k likeliest tokens that are compared.")
    alpha: float = Field(0.6, ge=0, le=1, description="Weight of not repeating; 0 is greedy.")


@dataclass
class _Memory:
    """What a request remembers: outputs at the tokens that are settled, and the candidates' probabilities."""

    history: list[Tensor] = field(default_factory=list)
    """Unit vectors, [T, D] of the prompt and then [1, D] a token."""
    likely: Tensor | None = None
    """[k] P(v | text); None before there are candidates."""


class Strategy(Decoding):
    """k rows per request, one for each candidate."""

    Settings = Options
    READS_PROMPT = True

    @property
    def rows(self) -> int:
        """The number of candidates."""
        return self.settings.candidates

    def begin(self, prompt_hidden: Tensor) -> Any:
        """Remember the outputs at the prompt."""
        return _Memory([_unit(prompt_hidden)])

    def advance(self, view: View) -> tuple[Tensor, Tensor]:
        """Every row follows the best candidate, with one of its likeliest continuations each."""
        hidden = _unit(view.hidden)
        chosen = [self._best(memory, hidden[g]) for g, memory in enumerate(view.memories)]
        parents = torch.tensor(chosen, device=hidden.device).unsqueeze(1).expand(-1, self.rows)
        scores = view.logprobs[torch.arange(len(chosen)), parents[:, 0]]  # [G, V]
        values, tokens = scores.topk(min(self.rows, scores.shape[1]), dim=1)
        tokens = _widen(tokens.masked_fill(values == -torch.inf, DROP), self.rows)
        for g, (memory, place) in enumerate(zip(view.memories, chosen, strict=True)):
            memory.history.append(hidden[g, place, None])
            memory.likely = _widen(values.exp(), self.rows)[g]
        over = view.ended.gather(1, parents)
        alone = torch.arange(self.rows, device=tokens.device) == 0
        return parents, torch.where(over, torch.where(alone, KEEP, DROP), tokens)

    def order(self, rows: Sequence[Row]) -> list[int]:
        """One result: the other rows hold candidates that were not taken."""
        return [max(range(len(rows)), key=lambda r: rows[r].score)]

    def _best(self, memory: _Memory, hidden: Tensor) -> int:
        """Which candidate is settled: hidden [k, D] are the outputs at them. Before there are any, all rows are equal."""
        if memory.likely is None:
            return 0
        alike = (hidden @ torch.cat(memory.history).T).amax(1)
        alpha = self.settings.alpha
        values = (1 - alpha) * memory.likely - alpha * alike
        return int(values.masked_fill(memory.likely <= 0, -torch.inf).argmax())


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _widen(values: Tensor, rows: int) -> Tensor:
    """[G, n] to [G, rows]: a vocabulary smaller than k leaves rows without a candidate."""
    fill = DROP if values.dtype == torch.long else 0
    return torch.nn.functional.pad(values, (0, rows - values.shape[1]), value=fill)
