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
from nestling.generation.strategy import DROP, KEEP, Decoding, View


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
        vocabulary, rows = view.logits.shape[2], self.rows
        totals = self._open_scores(view)  # [G, R]
        scaled = view.penalised() / _scoring_temperature(view)
        going_on = (totals.unsqueeze(2) + scaled.log_softmax(2)) / _power(view.lengths + 1, self.settings).unsqueeze(2)
        staying = view.scores / _power(view.lengths, self.settings)
        candidates = torch.cat([going_on.flatten(1), staying.masked_fill(~view.ended, -torch.inf)], 1)
        best = candidates.topk(rows, dim=1)
        stays = best.indices >= rows * vocabulary
        parents = torch.where(stays, best.indices - rows * vocabulary, best.indices // vocabulary)
        tokens = torch.where(stays, KEEP, best.indices % vocabulary)
        return parents, tokens.masked_fill(best.values == -torch.inf, DROP)

    def best(self, rows: Sequence[Row]) -> int:
        """The row with the best length-normalised score."""
        scores = [row.score / max(row.count, 1) ** self.settings.length_penalty for row in rows]
        return max(range(len(rows)), key=scores.__getitem__)

    def _open_scores(self, view: View) -> Tensor:
        """[G, R] scores of rows that go on; -inf for ended rows and, at the first step, for all equal rows but one."""
        totals = view.scores.masked_fill(view.ended, -torch.inf)
        copies = (view.lengths == 0) & (torch.arange(self.rows, device=totals.device) > 0)
        return totals.masked_fill(copies, -torch.inf)


def _scoring_temperature(view: View) -> Tensor:
    """[G, 1, 1]"""
    return view.column("scoring_temperature").view(-1, 1, 1)


def _power(lengths: Tensor, options: Options) -> Tensor:
    return lengths.clamp_min(1).float() ** options.length_penalty
