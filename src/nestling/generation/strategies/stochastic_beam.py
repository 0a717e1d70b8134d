"""Stochastic beam search: R texts drawn from the model without replacement (Kool, van Hoof and Welling 2019).

Adding Gumbel noise to the log-probability of every text and keeping the R largest draws R different texts, as if one drew
again and again and ignored what had been drawn. The search does that without listing the texts: the noisy value of a
beginning is the largest of all texts that go on from it, so the noise of its continuations is drawn conditionally on
that maximum (their Algorithm 1), and a beam of R finds the R largest exactly.

The texts come in the order in which they were drawn: the first one alone is an ordinary sample. They come from the
distribution that the request asks for, with its temperature, filters, penalties and constraint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from nestling.core.config import Config
from nestling.generation.sequence import Row
from nestling.generation.strategies import _beams
from nestling.generation.strategy import Decoding, View


class Options(Config):
    """Options of stochastic beam search."""

    beams: int = Field(4, ge=1, le=1024, description="How many different texts are drawn.")


class Strategy(Decoding):
    """R rows per request, R · V random numbers per token."""

    Settings = Options
    SAMPLES = True

    @property
    def rows(self) -> int:
        """The number of texts."""
        return self.settings.beams

    def begin(self, prompt_hidden: Tensor) -> Any:
        """Each row's log-probability under the shaped distribution and its noisy value, [2, R]; all 0 at the root."""
        return prompt_hidden.new_zeros(2, self.rows, dtype=torch.float32)

    def advance(self, view: View) -> tuple[Tensor, Tensor]:
        """The R continuations with the largest noisy values."""
        likely, noisy = torch.stack(view.memories, 1)  # [G, R] each
        noisy = noisy.masked_fill(_beams.only_first(view), -math.inf)
        going_on = likely.unsqueeze(2) + view.shaped.log_softmax(2)
        gumbels = conditioned(going_on, going_on + view.gumbels(*going_on.shape[1:]), noisy)
        parents, tokens, values = _beams.choose(gumbels, noisy, view.ended)
        extended = going_on.flatten(1).gather(1, parents * going_on.shape[2] + tokens.clamp_min(0))
        likely = torch.where(tokens >= 0, extended, likely.gather(1, parents))
        for g, running in enumerate(view.requests):
            running.memory = torch.stack([likely[g], values[g]])
        return parents, tokens

    def order(self, rows: Sequence[Row]) -> list[int]:
        """As drawn: `advance` leaves the rows so."""
        return list(range(len(rows)))


def conditioned(likely: Tensor, gumbels: Tensor, maximum: Tensor) -> Tensor:
    """Shift Gumbels so that the largest of each row is `maximum` (Kool et al., appendix B.3, stable form).

    Args:
        likely: [G, R, V] their locations; -inf for what can't be drawn.
        gumbels: [G, R, V] independent Gumbels at these locations.
        maximum: [G, R] what the largest must be; -inf for rows that are not followed.
    """
    top = gumbels.amax(2, keepdim=True)
    goal = maximum.unsqueeze(2)
    lowered = goal - gumbels + torch.log1p(-torch.exp(gumbels - top))  # −inf at the largest itself
    shifted = goal - lowered.clamp_min(0) - torch.log1p(torch.exp(-lowered.abs()))
    dead = (likely == -math.inf) | (goal == -math.inf)
    return torch.where(gumbels == top, goal, shifted).masked_fill(dead, -math.inf)
