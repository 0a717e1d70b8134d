"""Beam search: follow the R continuations with the best score; the best one when all have ended is the result.

score(y) = log P(y | prompt) / length(y)^α, after Wu et al. 2016 (eq. 14) with the plain power of Hugging Face's
`length_penalty` instead of ((5 + length) / 6)^α. A hypothesis that has ended keeps its place as long as no better one
takes it. Probabilities are taken at the request's temperature (1 when it is 0), like all that the engine returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from nestling.core.config import Config
from nestling.generation.sequence import Row
from nestling.generation.strategies import _beams
from nestling.generation.strategy import Decoding, View


class Options(Config):
    """Options of beam search."""

    beams: int = Field(4, ge=1, le=1024, description="Hypotheses R that are followed at once.")
    length_penalty: float = Field(1.0, ge=0, description="Power α of the length that scores are divided by; 0: none.")


class Strategy(Decoding):
    """R rows per request."""

    Settings = Options

    @property
    def rows(self) -> int:
        """The number of beams."""
        return self.settings.beams

    def advance(self, view: View) -> tuple[Tensor, Tensor]:
        """The R best of all continuations of live rows and all rows that have ended."""
        alpha = self.settings.length_penalty
        totals = view.scores.masked_fill(_beams.only_first(view), -torch.inf)
        going_on = (totals.unsqueeze(2) + view.logprobs) / (view.lengths + 1).unsqueeze(2).float() ** alpha
        staying = view.scores / view.lengths.clamp_min(1).float() ** alpha
        parents, tokens, _ = _beams.choose(going_on, staying, view.ended)
        return parents, tokens

    def order(self, rows: Sequence[Row]) -> list[int]:
        """By length-normalised score."""
        scores = [row.score / max(row.count, 1) ** self.settings.length_penalty for row in rows]
        return sorted(range(len(rows)), key=lambda r: -scores[r])
