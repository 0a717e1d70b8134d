"""Diverse beam search: groups of beams that avoid each other's words (Vijayakumar et al. 2018, Algorithm 1).

Group by group, each step is a beam search step in which a token costs λ for every beam of an earlier group that takes the
same token at this step (their Hamming diversity). λ decides which beams survive; results are ordered by likelihood alone.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nestling.core.errors import UserError
from nestling.generation.strategies import _beams
from nestling.generation.strategy import View


class Options(_beams.Options):
    """Options of diverse beam search."""

    groups: int = Field(4, ge=1, le=1024, description="Groups that the beams are divided into evenly.")
    diversity: float = Field(
        0.5, ge=0, description="Cost λ, in nats, of a token for each earlier beam that takes it now."
    )

    @model_validator(mode="after")
    def _groups_are_equal(self) -> Options:
        if self.beams % self.groups:
            raise UserError("does not divide the beams evenly", where="groups", value=self.groups)
        return self


class Strategy(_beams.Beams):
    """R rows per request, group after group."""

    Settings = Options

    def advance(self, view: View) -> tuple[Tensor, Tensor]:
        """One beam search step for each group, in order."""
        width, alpha = self.rows // self.settings.groups, self.settings.length_penalty
        first = (view.lengths == 0) & (torch.arange(self.rows, device=view.lengths.device) % width > 0)
        going_on = view.scores.masked_fill(first, -torch.inf).unsqueeze(2) + view.logprobs
        powers = (view.lengths + 1).unsqueeze(2).float() ** alpha
        staying = view.scores / view.lengths.clamp_min(1).float() ** alpha
        taken = torch.zeros_like(view.logprobs[:, 0])  # [G, V] beams of earlier groups that take a token now
        parents, tokens = [], []
        for start in range(0, self.rows, width):
            part = slice(start, start + width)
            values = (going_on[:, part] - self.settings.diversity * taken.unsqueeze(1)) / powers[:, part]
            origin, chosen, _ = _beams.choose(values, staying[:, part], view.ended[:, part])
            taken.scatter_add_(1, chosen.clamp_min(0), (chosen >= 0).to(taken))
            parents.append(origin + start)
            tokens.append(chosen)
        return torch.cat(parents, 1), torch.cat(tokens, 1)
