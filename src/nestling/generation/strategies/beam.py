"""Beam search: follow the R continuations with the best score; the best one when all have ended is the result.

score(y) = log P(y | prompt) / length(y)^α, after Wu et al. 2016 (eq. 14) with the plain power of Hugging Face's
`length_penalty` instead of ((5 + length) / 6)^α. A hypothesis that has ended keeps its place as long as no better one
takes it. Probabilities are taken at the request's temperature (1 when it is 0), like all that the engine returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.generation.strategies import _beams
from nestling.generation.strategy import View


class Strategy(_beams.Beams):
    """R rows per request."""

    def advance(self, view: View) -> tuple[Tensor, Tensor]:
        """The R best of all continuations of live rows and all rows that have ended."""
        alpha = self.settings.length_penalty
        totals = view.scores.masked_fill(_beams.only_first(view), -torch.inf)
        going_on = (totals.unsqueeze(2) + view.logprobs) / (view.lengths + 1).unsqueeze(2).float() ** alpha
        staying = view.scores / view.lengths.clamp_min(1).float() ** alpha
        parents, tokens, _ = _beams.choose(going_on, staying, view.ended)
        return parents, tokens
